"""Starts a program as a group of processes on this machine: ``python -m fr_jax.launch --processes 2 -- -m module ..``.

Each process gets an equal share of the cores and GPUs, and each line of its output begins with its number. If one
fails, the others are stopped (:mod:`fr_jax.distributed._supervision`).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

from fr_jax.distributed._joining import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port
from fr_jax.distributed._supervision import prefix_of, report, wait

__all__ = ["LAUNCHED_BY", "LaunchError", "main", "start", "wait"]

# The variable of the processes' environment that holds the command which started the group.
LAUNCHED_BY = "FR_JAX_LAUNCHED_BY"
# For a process with a single core: XLA's CPU client has one thread per core, and a single thread would send nothing to
# other processes before it has computed all that was issued.
TWO_THREADS = {"NPROC": "2"}
# For the same: freed memory stays with the process, in huge pages, because fetching it anew in each step costs a
# quarter of the time of a convolutional network. The C library of other systems does not know this variable.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:"
    "glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456"
}

# Run by each process before it becomes the program. A preexec_fn would do it too, but needs a fork of this process,
# which may deadlock once JAX has started threads in it.
_PREPARE = """
import _signal as signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for Ctrl-C; _signal is there at once, signal is not
import ctypes, os, sys
cores, *program = sys.argv[1:]
if cores:
    os.sched_setaffinity(0, map(int, cores.split(",")))
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *program])
"""


class LaunchError(ValueError):
    """The group cannot be started with these settings; the message says which are possible."""


def share_of(process_id: int, processes: int, items: Sequence[int]) -> list[int]:
    """The cores or GPUs of one process: an equal, contiguous share; empty if there are fewer than processes."""
    share = len(items) // processes
    return list(items[process_id * share : (process_id + 1) * share])


def count_gpus() -> int:
    """The number of NVIDIA GPUs that JAX would use in a process started here."""
    # JAX itself must not start here: it would take the memory of the GPUs that the processes need.
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


def start(arguments: Sequence[str], processes: int, *, pin: bool = True, mark: bool = True) -> list[subprocess.Popen]:
    """Starts ``python ARGUMENTS`` once per process, with the environment for :func:`fr_jax.distributed.initialize`.

    Args:
      arguments: of the Python interpreter, such as ``["-m", "fr_jax.experiments.cifar", "--K", "4"]``.
      processes: how many.
      pin: restrict each process to an equal share of the cores (Linux only). One with a single core has NPROC=2 and,
        with the GNU C library, GLIBC_TUNABLES that keep freed memory, unless the environment sets them.
      mark: let :func:`wait` prefix each line of output; otherwise it goes where that of this process goes.

    Returns:
      The processes, for :func:`wait`. They receive SIGTERM if this process dies (Linux only), and no signals from the
      terminal.

    Raises:
      LaunchError: ``processes`` is below 1, or there are not enough GPUs or cores.

    Example:
      >>> from fr_jax.distributed import launch
      >>> group = launch.start(["-c", "import sys; sys.exit(3)"], processes=2, pin=False)
      >>> launch.wait(group)
      3
    """
    if processes < 1:
        raise LaunchError(f"--processes {processes} is out of range; it must be at least 1.")
    coordinator = f"127.0.0.1:{free_port()}"
    available = sorted(os.sched_getaffinity(0)) if pin and hasattr(os, "sched_setaffinity") else None
    if available is not None and len(available) < processes:
        raise LaunchError(
            f"--processes {processes} needs one core per process, and there are {len(available)}. Use at most "
            f"{len(available)}, or --no-pin to share the cores."
        )
    gpus = count_gpus()
    if 0 < gpus < processes and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        raise LaunchError(
            f"--processes {processes} needs one GPU per process, and there are {gpus}. Use at most {gpus}, or set "
            "JAX_PLATFORMS=cpu."
        )
    output = subprocess.PIPE if mark else None
    on_glibc = platform.libc_ver()[0] == "glibc"
    group = []
    by = f"python -m fr_jax.launch --processes {processes}{'' if pin else ' --no-pin'}"
    for i in range(processes):
        cores = share_of(i, processes, available or [])
        own = {COORDINATOR: coordinator, NUM_PROCESSES: str(processes), PROCESS_ID: str(i), LAUNCHED_BY: by}
        tuned = TWO_THREADS | (KEEP_MEMORY if on_glibc else {}) if len(cores) == 1 else {}
        environment = {"PYTHONUNBUFFERED": "1", **tuned, **os.environ, **own}
        if mark and sys.stdout.isatty():
            environment["COLUMNS"] = str(max(20, shutil.get_terminal_size().columns - len(prefix_of(i))))
        if devices := share_of(i, processes, range(gpus)):
            environment.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, devices)))
        command = [sys.executable, "-c", _PREPARE, ",".join(map(str, cores)), *arguments]
        # A session of its own: Ctrl-C reaches the processes through `wait` only, once.
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        group.append(subprocess.Popen(command, env=environment, start_new_session=True, **streams))
    return group


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns the exit code of :func:`wait`, or 2 for bad arguments.

    Example:
      >>> from fr_jax.distributed import launch
      >>> launch.main(["--processes", "1", "--", "-c", "print('hello')"])
      [0] hello
      0
    """
    parser = argparse.ArgumentParser(
        prog="python -m fr_jax.launch",
        description="Start a program as a group of processes on this machine. Its stages are spread over all of them.",
        epilog="Example: python -m fr_jax.launch --processes 2 -- -m fr_jax.experiments.cifar --K 4",
    )
    parser.add_argument("--processes", type=int, required=True, help="number of processes")
    pin = "restrict each process to its share of the cores"
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, default=True, help=pin)
    parser.add_argument("program", nargs=argparse.REMAINDER, help="-- and the arguments of `python`")
    settings = parser.parse_args(arguments)
    program = settings.program[1:] if settings.program[:1] == ["--"] else settings.program
    if not program:
        parser.error("the program is missing; give it after --, such as -- -m fr_jax.experiments.cifar --K 4")
    try:
        return wait(start(program, settings.processes, pin=settings.pin))
    except LaunchError as error:
        report(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
