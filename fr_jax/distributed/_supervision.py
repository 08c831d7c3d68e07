"""Supervises the processes that :mod:`fr_jax.launch` started: their output, signals for them, and their end."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import BinaryIO, TypeAlias

__all__ = ["prefix_of", "report", "wait"]

GRACE_SECONDS = 5.0  # for the others to end by themselves after one process has failed
STOP_SECONDS = 60.0  # the same after a signal asked all of them to stop: they may have a checkpoint to write
SIGNAL_SECONDS = 600.0  # after a first signal if no process ends: a step can be long, and a checkpoint large
EARLY_SECONDS = 120.0  # for the others after one has ended with code 0: process 0 may have pictures to draw
POLL_SECONDS = 0.1
FAILED = 1
NEVER = float("inf")

Signal: TypeAlias = tuple[int, float]  # its number and time


def wait(group: Sequence[subprocess.Popen]) -> int:
    """Forwards the output of a group, and signals to it, until all of its processes have ended.

    Each line from their pipes is prefixed with their number. Processes that do not end by themselves are killed
    :data:`GRACE_SECONDS` after one has failed (:data:`STOP_SECONDS` if a signal came first), :data:`SIGNAL_SECONDS`
    after a first signal and :data:`GRACE_SECONDS` after a second one, or :data:`EARLY_SECONDS` after one has ended with
    code 0, because they may be waiting for it.

    Returns:
      0, or the exit code of the first process that failed, as shells count (128 + signal). If none failed before some
      were killed: 128 + the forwarded signal, or 1.

    Example:
      >>> from fr_jax.distributed import launch
      >>> launch.wait(launch.start(["-c", "print('hello')"], processes=1))
      [0] hello
      0
    """
    readers = [
        threading.Thread(target=_copy_lines, args=(pipe, out, prefix_of(i)), daemon=True)
        for i, process in enumerate(group)
        for pipe, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        if pipe is not None
    ]
    for reader in readers:
        reader.start()
    try:
        with _forwarding_signals(group) as signals:
            code, reason = _wait_for_all(group, signals)
    finally:
        for process in group:
            process.kill()
    for reader in readers:
        reader.join(timeout=GRACE_SECONDS)
    if reason is not None:  # again, because the others have printed much since
        report(f"ended because {reason}. A training program continues with --resume from its newest checkpoint.")
    return code


def _wait_for_all(group: Sequence[subprocess.Popen], signals: Sequence[Signal]) -> tuple[int, str | None]:
    """The exit code, and the reason if a signal ended the first process that failed."""
    code, reason, killed = 0, None, False
    failed = early = NEVER
    first = None  # the first process that ended with code 0
    running = dict(enumerate(group))
    while running:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        for i in [i for i, process in running.items() if process.poll() is not None]:
            status = running.pop(i).returncode
            if status == 0 and first is None:
                early, first = now, i
            elif status and not code:
                code, failed = 128 - status if status < 0 else status, now
                if status < 0:
                    reason = f"process {i} was ended by {signal.Signals(-status).name}"
                    report(f"{reason}; the others cannot continue.")
        if running and not killed and now > _deadline(failed, early, signals):
            killed = True
            names = ", ".join(map(str, running))
            if first is not None and not code and not signals:
                code = FAILED
                report(
                    f"process {names} did not end within {EARLY_SECONDS:g} s of process {first}, which ended with "
                    "code 0, and is killed. All must take part to the end: check that they have the same program and "
                    "settings."
                )
            else:
                code = code or 128 + signals[0][0]
                report(f"process {names} did not end by itself, and is killed.")
            for process in running.values():
                process.kill()
    return code, reason


def _deadline(failed: float, early: float, signals: Sequence[Signal]) -> float:
    """When to kill the rest, given the times at which one first failed and one first ended with code 0."""
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
    """Forwards SIGINT and SIGTERM to all processes; yields the list of those forwarded."""
    forwarded: list[Signal] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append((number, time.monotonic()))
        for process in group:
            process.send_signal(number)

    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_writing = threading.Lock()


def _copy_lines(pipe: BinaryIO, out: object, prefix: str) -> None:
    """Copies a process's output, each line with a prefix."""
    rest, shorten = b"", _make_shorten()  # the beginning of a line whose end has not come
    with pipe:
        while chunk := pipe.read1(65536):  # type: ignore[attr-defined]
            # splitlines also ends a line at \r, with which a progress bar is drawn again.
            *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").splitlines(keepends=True)
            if rest.endswith((b"\n", b"\r")):
                whole, rest = [*whole, rest], b""
            _write(out, "".join(prefix + line.decode(errors="replace") for line in map(shorten, whole) if line))
    if rest:
        _write(out, f"{prefix}{rest.decode(errors='replace')}\n")


# How messages of JAX's coordination service begin, and those of this library and of Python that may follow.
_LOGGED = re.compile(rb"(?P<level>[EFWI])\d{4} [\d:.]+\s+\d+ (coordination_service\w*\.cc|client\.h):\d+\]")
_OTHERS = (b"fr_jax: ", b"Traceback ")
_LOST = b"fr_jax: JAX ends this process, because another one has died or cannot be reached.\n"


def _make_shorten() -> Callable[[bytes], bytes]:
    """``line -> line`` for the lines of one stream in order: one line for the C++ stack of a member of a lost group.

    JAX (0.10.2) aborts a process that can no longer reach the others, and prints some thirty lines.
    """
    in_message = is_over = False  # a message may have several lines; nothing but the stack comes after the last

    def shorten(line: bytes) -> bytes:
        nonlocal in_message, is_over
        logged = _LOGGED.match(line)
        in_message = logged is not None or (in_message and not line.startswith(_OTHERS))
        if is_over or logged is None or logged["level"] != b"F":
            return b"" if is_over or in_message else line
        is_over = True
        return _LOST

    return shorten


def _write(out: object, text: str) -> None:
    # One write at a time, so that lines of several processes do not mix; a closed terminal must not end the run.
    with _writing, contextlib.suppress(BrokenPipeError, ValueError):
        out.write(text)  # type: ignore[attr-defined]
        out.flush()  # type: ignore[attr-defined]


def prefix_of(process_id: int) -> str:
    """The beginning of its lines of output."""
    return f"[{process_id}] "


def report(text: str) -> None:
    """Prints a line of the launcher on stderr, between those of the processes."""
    _write(sys.stderr, f"fr_jax: {text}\n")
