"""Waits for the processes that :mod:`fr_jax.launch` started: their output, signals for them, and their end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import BinaryIO, TypeAlias

__all__ = ["mark_of", "say", "wait"]

GRACE_SECONDS = 5.0
"""Between the first process that fails and the end of those that have not ended by themselves."""
STOP_SECONDS = 60.0
"""The same, where a signal asked all of them to stop: they may have a checkpoint to write."""
SIGNAL_SECONDS = 600.0
"""Between a first signal and the end, where no process reacts: long steps, and a checkpoint, take their time."""
EARLY_SECONDS = 120.0
"""Between the first process that ends with code 0 and the end of the others, which may have pictures to draw."""
POLL_SECONDS = 0.1
FAILED = 1
NEVER = float("inf")

Signal: TypeAlias = tuple[int, float]
"""Its number, and when it came."""


def wait(group: Sequence[subprocess.Popen]) -> int:
    """Passes on the group's output and this process's signals until all have ended.

    Those that do not end by themselves are killed:

    - :data:`GRACE_SECONDS` after one has failed, or :data:`STOP_SECONDS` where a signal came first;
    - :data:`SIGNAL_SECONDS` after a first signal, and :data:`GRACE_SECONDS` after a second one;
    - :data:`EARLY_SECONDS` after one has ended with code 0, for they may be waiting for it.

    Args:
      group: the processes, in order; what goes into their pipes is marked with their numbers.

    Returns:
      0, or the exit code of the first that failed, counted as shells do (128 + signal). Where none failed before some
      were killed: 128 + the signal that was passed on, or 1.

    Example:
      >>> from fr_jax.distributed import launch
      >>> launch.wait(launch.start(["-c", "print('hello')"], processes=1))
      [0] hello
      0
    """
    readers = [
        threading.Thread(target=_relay, args=(pipe, out, mark_of(i)), daemon=True)
        for i, process in enumerate(group)
        for pipe, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        if pipe is not None
    ]
    for reader in readers:
        reader.start()
    try:
        with _forwarding_signals(group) as signals:
            code, why = _wait_for_all(group, signals)
    finally:
        for process in group:
            process.kill()
    for reader in readers:
        reader.join(timeout=GRACE_SECONDS)
    if why is not None:  # again, below what the others printed when they lost it
        say(f"ended because {why}. A training program continues with --resume from its newest checkpoint.")
    return code


def _wait_for_all(group: Sequence[subprocess.Popen], signals: Sequence[Signal]) -> tuple[int, str | None]:
    """The exit code, and the first that failed where a signal ended it."""
    code, killed, remarked, why = 0, False, False, None
    failed = early = NEVER
    first = None  # that ended with code 0
    running = list(range(len(group)))
    while running:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        for i in [i for i in running if group[i].poll() is not None]:
            running.remove(i)
            status = group[i].returncode
            if status == 0 and first is None:
                early, first = now, i
            elif status and not code:
                code, failed = 128 - status if status < 0 else status, now
                if status < 0:
                    why = f"process {i} was ended by {signal.Signals(-status).name}"
                    say(f"{why}; the others cannot go on.")
        rest = ", ".join(map(str, running))
        only_early = first is not None and not code and not signals
        if running and only_early and not remarked and now > early + GRACE_SECONDS:
            remarked = True
            say(
                f"process {first} ended with code 0 before process {rest}, which must end within {EARLY_SECONDS:g} s "
                "of it."
            )
        if running and not killed and now > _deadline(failed, early, signals):
            killed = True
            if only_early:
                code = FAILED
                say(
                    f"process {rest} did not end within {EARLY_SECONDS:g} s of process {first}, which ended with code "
                    "0, and is killed. All must take part to the end; is one given another program or other settings?"
                )
            else:
                code = code or 128 + signals[0][0]
                say(f"process {rest} did not end by itself, and is killed.")
            for i in running:
                group[i].kill()
    return code, why


def _deadline(failed: float, early: float, signals: Sequence[Signal]) -> float:
    """When those are killed that still run, from when one first failed and when one first ended with code 0."""
    if not signals:
        return min(failed + GRACE_SECONDS, early + EARLY_SECONDS)
    (_, asked), (_, again), *_ = *signals, (0, NEVER)
    return min(
        failed + (STOP_SECONDS if failed > asked else GRACE_SECONDS),
        max(early, asked) + STOP_SECONDS,
        asked + SIGNAL_SECONDS,
        again + GRACE_SECONDS,
    )


@contextlib.contextmanager
def _forwarding_signals(group: Sequence[subprocess.Popen]) -> Iterator[list[Signal]]:
    """SIGINT and SIGTERM go to all processes of the group; yields those that did."""
    forwarded: list[Signal] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append((number, time.monotonic()))
        for process in group:
            process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, forward) for number in numbers} if in_main else {}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_writing = threading.Lock()


def _relay(pipe: BinaryIO, out: object, mark: str) -> None:
    """Copies a process's output, each line (or redrawn line of a progress bar) marked."""
    rest = b""
    with pipe:
        while chunk := pipe.read1(65536):  # type: ignore[attr-defined]
            *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").splitlines(keepends=True)
            if rest.endswith((b"\n", b"\r")):
                whole, rest = [*whole, rest], b""
            _write(out, "".join(mark + line.decode(errors="replace") for line in whole))
    if rest:
        _write(out, f"{mark}{rest.decode(errors='replace')}\n")


def _write(out: object, text: str) -> None:
    with _writing, contextlib.suppress(BrokenPipeError, ValueError):
        out.write(text)  # type: ignore[attr-defined]
        out.flush()  # type: ignore[attr-defined]


def mark_of(process_id: int) -> str:
    """What its lines of output begin with."""
    return f"[{process_id}] "


def say(text: str) -> None:
    """A line of the launcher's own, on stderr, between those of the processes."""
    _write(sys.stderr, f"fr_jax: {text}\n")
