"""Starts a program as a group of processes on this machine: ``python -m fr_jax.launch --processes 2 -- -m module ..``.

Each process gets cores of its own (and GPUs of its own, where there are enough), and every line of its output is
marked with its number. When one fails, the others are ended.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import BinaryIO

from fr_jax.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port

__all__ = ["LAUNCHED_BY", "LaunchError", "main", "start", "wait"]

GRACE_SECONDS = 5.0
"""Between the first process that fails and the end of those that have not ended by themselves."""
STOP_SECONDS = 60.0
"""The same, where a signal asked all of them to stop: they may have a checkpoint to write."""
POLL_SECONDS = 0.1
LAUNCHED_BY = "FR_JAX_LAUNCHED_BY"
"""Environment variable of the processes: the command that starts the group."""

TWO_THREADS = {"NPROC": "2"}
"""Environment of processes with a single core, unless this one has the variable. XLA's CPU client has as many threads
as cores, and a single one, which computes what has been issued, would send nothing elsewhere before all is done."""

# What a process does before it becomes the program; a preexec_fn would fork this one, which JAX does not bear.
_PREPARE = """
import ctypes, os, signal, sys
cores, *program = sys.argv[1:]
if cores:
    os.sched_setaffinity(0, map(int, cores.split(",")))
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *program])
"""


class LaunchError(ValueError):
    """The group cannot be started as asked; the message says what is possible."""


def cores_of(process_id: int, processes: int, available: Sequence[int]) -> list[int]:
    """The cores of one process: an equal, contiguous share.

    Raises:
      LaunchError: there are fewer cores than processes.

    Example:
      >>> from fr_jax.launch import cores_of
      >>> cores_of(1, 2, [0, 1, 2, 3])
      [2, 3]
    """
    share = len(available) // processes
    if share < 1:
        raise LaunchError(
            f"--processes {processes} need a core each, and there are {len(available)}. Use at most "
            f"{len(available)}, or --no-pin to let them share."
        )
    return list(available[process_id * share : (process_id + 1) * share])


def gpus_of(process_id: int, processes: int, available: int) -> str | None:
    """The GPUs of one process, for ``JAX_LOCAL_DEVICE_IDS``; None where there are fewer GPUs than processes.

    Example:
      >>> from fr_jax.launch import gpus_of
      >>> gpus_of(1, 2, 4), gpus_of(0, 2, 1)
      ('2,3', None)
    """
    share = available // processes
    return ",".join(map(str, range(process_id * share, (process_id + 1) * share))) if share else None


def count_gpus() -> int:
    """NVIDIA GPUs that a process started here would use."""
    if os.environ.get("JAX_PLATFORMS", "cuda").startswith("cpu"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids = [one.strip() for one in visible.split(",")]
        return next((i for i, one in enumerate(ids) if one in ("", "-1", "NoDevFiles")), len(ids))
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def start(
    arguments: Sequence[str], processes: int, *, pin: bool = True, coordinator: str | None = None, mark: bool = True
) -> list[subprocess.Popen]:
    """Starts ``python ARGUMENTS`` once a process, with what :func:`fr_jax.distributed.initialize` needs to know.

    Args:
      arguments: of the Python interpreter, such as ``["-m", "fr_jax.experiments.cifar", "--K", "4"]``.
      processes: how many.
      pin: give each process an equal share of this one's cores, and no others (Linux only).
      coordinator: ``HOST:PORT`` of process 0; a free port of 127.0.0.1 by default.
      mark: mark every line of output with the process's number; otherwise they write where this process does.

    Returns:
      The processes, to be given to :func:`wait`. They get SIGTERM when this process dies (Linux only), and no signals
      from the terminal.

    Raises:
      LaunchError: ``processes`` is below 1, or there are not enough GPUs, or cores to pin that many.
    """
    if processes < 1:
        raise LaunchError(f"--processes {processes} is out of range; it must be at least 1.")
    coordinator = coordinator or f"127.0.0.1:{free_port()}"
    available = sorted(os.sched_getaffinity(0)) if pin and hasattr(os, "sched_setaffinity") else None
    shares = [None if available is None else cores_of(i, processes, available) for i in range(processes)]
    gpus = count_gpus()
    if 0 < gpus < processes and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        raise LaunchError(
            f"--processes {processes} need a GPU each, and there are {gpus}. Use at most {gpus}, or set "
            "JAX_PLATFORMS=cpu."
        )
    output = subprocess.PIPE if mark else None
    group = []
    by = f"python -m fr_jax.launch --processes {processes}{'' if pin else ' --no-pin'}"
    for i, cores in enumerate(shares):
        own = {COORDINATOR: coordinator, NUM_PROCESSES: str(processes), PROCESS_ID: str(i), LAUNCHED_BY: by}
        tuned = TWO_THREADS if cores is not None and len(cores) == 1 else {}
        environment = {"PYTHONUNBUFFERED": "1", **tuned, **os.environ, **own}
        if mark and sys.stdout.isatty():
            environment["COLUMNS"] = str(max(20, shutil.get_terminal_size().columns - len(_mark(i))))
        if (devices := gpus_of(i, processes, gpus)) is not None:
            environment.setdefault("JAX_LOCAL_DEVICE_IDS", devices)
        group.append(
            subprocess.Popen(
                [sys.executable, "-c", _PREPARE, ",".join(map(str, cores or ())), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )
    return group


def wait(group: Sequence[subprocess.Popen]) -> int:
    """Passes on the group's output and this process's signals until all have ended.

    When one fails, the others have :data:`GRACE_SECONDS` to end by themselves; then they are killed. They have
    :data:`STOP_SECONDS` where a signal came first, and :data:`GRACE_SECONDS` again after a second signal.

    Returns:
      0, or the exit code of the first that failed, counted as shells do (128 + signal).
    """
    readers = [
        threading.Thread(target=_relay, args=(pipe, out, _mark(i)), daemon=True)
        for i, process in enumerate(group)
        for pipe, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        if pipe is not None
    ]
    for reader in readers:
        reader.start()
    try:
        with _forwarding_signals(group) as forwarded:
            code = _wait_for_all(group, forwarded)
    finally:
        for process in group:
            process.kill()
    for reader in readers:
        reader.join(timeout=GRACE_SECONDS)
    return code


def _wait_for_all(group: Sequence[subprocess.Popen], forwarded: list[int]) -> int:
    code, deadline = 0, float("inf")
    running = set(range(len(group)))
    while running:
        time.sleep(POLL_SECONDS)
        for i in sorted(running):
            status = group[i].poll()
            if status is None:
                continue
            running.discard(i)
            if status and not code:
                code = 128 - status if status < 0 else status
                if status < 0:
                    _say(f"process {i} was ended by {signal.Signals(-status).name}; the others cannot go on.")
                deadline = min(deadline, time.monotonic() + (STOP_SECONDS if forwarded else GRACE_SECONDS))
        if len(forwarded) > 1:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if running and time.monotonic() > deadline:
            _say(f"process {', '.join(map(str, sorted(running)))} did not end by itself, and is killed.")
            for i in running:
                group[i].kill()
            deadline = float("inf")
    return code


@contextlib.contextmanager
def _forwarding_signals(group: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to all processes of the group; yields those that did."""
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
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


def _mark(process_id: int) -> str:
    return f"[{process_id}] "


def _say(text: str) -> None:
    _write(sys.stderr, f"fr_jax: {text}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: that of the first process that failed, 2 for bad arguments, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fr_jax.launch",
        description="Start a program as a group of processes on this machine, stages spread over all of them.",
        epilog="Example: python -m fr_jax.launch --processes 2 -- -m fr_jax.experiments.cifar --K 4",
    )
    parser.add_argument("--processes", type=int, required=True, help="how many processes")
    parser.add_argument(
        "--pin", action=argparse.BooleanOptionalAction, default=True, help="give each process cores of its own"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help="-- and what comes after `python`")
    words = list(sys.argv[1:] if arguments is None else arguments)
    settings = parser.parse_args(words)
    program = settings.program[1:] if settings.program[:1] == ["--"] else settings.program
    if not program:
        parser.error("what to start is missing; give it after --, such as -- -m fr_jax.experiments.cifar --K 4")
    try:
        return wait(start(program, settings.processes, pin=settings.pin))
    except LaunchError as error:
        _say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
