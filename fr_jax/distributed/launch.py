"""Starts a program as a group of processes on this machine: ``python -m fr_jax.launch --processes 2 -- -m module ..``.

Each process gets cores of its own (and GPUs of its own, where there are enough), and every line of its output is
marked with its number. When one fails, the others are ended (:mod:`fr_jax.distributed._supervision`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from fr_jax.distributed._joining import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port
from fr_jax.distributed._supervision import mark_of, say, wait

__all__ = ["LAUNCHED_BY", "LaunchError", "main", "start", "wait"]

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
      >>> from fr_jax.distributed.launch import cores_of
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
      >>> from fr_jax.distributed.launch import gpus_of
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

    Example:
      >>> from fr_jax.distributed import launch
      >>> group = launch.start(["-c", "import sys; sys.exit(3)"], processes=2, pin=False)
      >>> launch.wait(group)
      3
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
            environment["COLUMNS"] = str(max(20, shutil.get_terminal_size().columns - len(mark_of(i))))
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: that of :func:`wait`, or 2 for bad arguments.

    Example:
      >>> from fr_jax.distributed import launch
      >>> launch.main(["--processes", "1", "--", "-c", "print('hello')"])
      [0] hello
      0
    """
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
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
