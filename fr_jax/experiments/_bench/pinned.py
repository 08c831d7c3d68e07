"""One process per stage, each pinned to a core of its own: the only way to make one CPU device one core."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from fr_jax.distributed import NUM_PROCESSES, group, initialize, launch
from fr_jax.experiments._cli.harness import command
from fr_jax.experiments._fields import SettingsError

__all__ = ["cores_by_process", "placed_on", "start_pinned", "start_processes"]


def start_pinned(name: str, defaults: Any, settings: Any) -> int | None:
    """With ``settings.pinned``, :func:`start_processes`; otherwise None: the stages are devices of this process."""
    return start_processes(name, defaults, settings) if settings.pinned else None


def start_processes(name: str, defaults: Any, settings: Any) -> int | None:
    """Starts the program of the module ``name`` ``settings.K`` times, with ``settings.pinned`` each on a single core.

    Returns:
      The exit code; None to go on in this process, as one of the started ones, which has joined the others.

    Raises:
      SettingsError: there are not as many cores, or processes cannot be pinned here.
    """
    K = settings.K
    if NUM_PROCESSES in os.environ:
        initialize()
        return None
    words = shlex.split(command(name, defaults, settings))[1:]
    try:
        if not settings.pinned:
            return launch.wait(launch.start(words, K, pin=False, mark=False))
        with _confined(_first_cores(K)):  # of which launch gives each process an equal share
            processes = launch.start(words, K, mark=False)
    except launch.LaunchError as error:
        raise SettingsError(f"--pinned: {error}") from error
    return launch.wait(processes)


def _first_cores(K: int) -> list[int]:
    """K cores of this process; raises SettingsError if there are fewer, or processes cannot be pinned here."""
    if not hasattr(os, "sched_setaffinity"):
        raise SettingsError(
            f"--pinned: {platform.system()} does not pin processes to cores; Linux does. Drop --pinned: the stages "
            "then share the cores."
        )
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < K:
        raise SettingsError(
            f"--pinned needs {K} cores for --K {K}; there are {len(cores)}. Use a smaller --K, or drop --pinned."
        )
    return cores[:K]


@contextlib.contextmanager
def _confined(cores: Sequence[int]) -> Iterator[None]:
    """What is started meanwhile has no other cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores_by_process() -> list[list[int] | None]:
    """The cores that each process may use, None where that cannot be known; in a group all processes must call it."""
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return group().exchange(own)


def placed_on(pinned: bool, K: int) -> dict[str, Any]:
    """What a result says of where its K stages were; in a group all processes must call it.

    Raises:
      SettingsError: with ``pinned``, they are not K processes with a core each.
    """
    found = cores_by_process()
    if pinned and not (len(found) == K == len({core for own in found for core in own or ()}) and all(found)):
        cores = "; ".join("any" if own is None else " ".join(map(str, own)) for own in found)
        raise SettingsError(
            f"--pinned needs {K} processes with a core each for --K {K}; these are {len(found)}, on the cores {cores}. "
            "Start the program without fr_jax.launch: with --pinned it starts the processes itself."
        )
    what = "one pinned process a stage" if pinned else "devices of one process"
    return {"placement": what, "cores_by_process": found}
