"""What the programs do for a run of several processes before it starts: join it, and see that all are alike."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fr_jax import distributed
from fr_jax.distributed.launch import LAUNCHED_BY
from fr_jax.experiments._cli.settings import TrainSettings, as_json
from fr_jax.experiments._fields import SettingsError, guard
from fr_jax.experiments._run.tasks import kind_of

__all__ = ["check_same_settings", "choose_devices", "join", "launched", "load_data"]


def join(settings: TrainSettings) -> None:
    """Makes this process one of a group if flags or the environment ask for it.

    Raises:
      SettingsError: there are more processes than devices of stages.
      GroupError: the processes do not find each other.
    """
    distributed.initialize(
        settings.coordinator,
        settings.num_processes,
        settings.process_id,
        detect=settings.distributed,
        heartbeat_seconds=settings.heartbeat,
    )
    group, needed = distributed.group(), settings.K * settings.data_parallel
    if group.size > needed:
        raise SettingsError(
            f"{group.size} processes are too many for --K {settings.K} stages of {settings.data_parallel} device(s); "
            f"each must have a device of some stage. Use at most {needed} processes, or a larger --K."
        )
    # Before anything else: processes with another --K would wait for each other without end.
    check_same_settings(as_json(settings))
    if group.size > 1 and group.index == 0:
        seconds = settings.heartbeat
        print(f"{group.size} processes; one that dies or cannot be reached ends the others after about {seconds} s.")


def launched(command: str) -> str:
    """The command that starts this run again, on all processes where ``fr_jax.launch`` made them."""
    if distributed.group().size == 1 or LAUNCHED_BY not in os.environ:
        return command
    # The launcher takes the program without "python", and starts it once per process.
    return f"{os.environ[LAUNCHED_BY]} -- {command.removeprefix('python ')}"


def load_data(settings: TrainSettings, preferred: str) -> Any:
    """The data set, the same in every process; process 0 looks for it first, and may fetch it."""
    group, load = distributed.group(), kind_of(settings.model).load
    quietly: dict[str, Any] = {} if group.index == 0 else {"log": lambda line: None}
    found = group.first_goes_first(lambda: load(settings, preferred=preferred, **quietly))
    if group.size > 1:
        arrays = [np.ascontiguousarray(x) for x in found if isinstance(x, np.ndarray)]
        checksums = [zlib.crc32(x.reshape(-1).view(np.uint8).data) for x in arrays]
        group.check_same("data set", [found.name, *checksums])
    return found


def check_same_settings(config: Mapping[str, Any]) -> None:
    """Compares all settings but those that may differ between the processes of a run; GroupError if two differ."""
    free = {field.name for field in dataclasses.fields(TrainSettings) if guard(field).free == "process"}
    free |= {"devices_used", "versions", "python", "data_source"}
    distributed.group().check_same("setting", {name: value for name, value in config.items() if name not in free})


def choose_devices(settings: TrainSettings) -> list[jax.Device]:
    """The devices of a run, one per place of a stage; a SettingsError if more were asked for than there are.

    In one process stages share few devices round robin; in several, neighbours share one, and are in the same process.
    """
    available, needed = jax.devices(), settings.K * settings.data_parallel
    if settings.devices is not None and settings.devices > len(available):
        raise SettingsError(
            f"--devices {settings.devices} were asked for; JAX sees {len(available)} ({available[0].platform}). "
            f"Use at most {len(available)}: stages share devices round robin."
        )
    wanted = min(settings.devices or needed, len(available))
    if distributed.group().size == 1:
        return available[:wanted]
    chosen = spread(_from_each_process(available, wanted), needed, settings.data_parallel)
    if len({device.process_index for device in chosen}) < distributed.group().size:
        raise SettingsError(
            f"{len(set(chosen))} devices for --K {settings.K} stages leave a process without a stage. Use more "
            "--devices, or fewer processes."
        )
    return chosen


def _from_each_process(available: list[jax.Device], wanted: int) -> list[jax.Device]:
    """The first few devices of every process, as evenly as can be, in order of the processes."""
    taken: dict[int, list[jax.Device]] = {}
    for device in available:
        taken.setdefault(device.process_index, []).append(device)
    shares = dict.fromkeys(taken, 0)
    for _ in range(wanted):
        open_ = [p for p in taken if shares[p] < len(taken[p])]
        shares[min(open_, key=lambda p: (shares[p], p))] += 1
    return [device for p, devices in sorted(taken.items()) for device in devices[: shares[p]]]


def spread(devices: list[jax.Device], needed: int, data_parallel: int) -> list[jax.Device]:
    """``needed`` places on fewer devices, in contiguous runs of groups of ``data_parallel``.

    Example:
      >>> from fr_jax.experiments._run.processes import spread
      >>> spread(["a", "b"], 4, 1)
      ['a', 'a', 'b', 'b']
    """
    groups = [devices[i : i + data_parallel] for i in range(0, len(devices) - data_parallel + 1, data_parallel)]
    if not groups:
        return devices
    stages = needed // data_parallel
    return [device for k in range(stages) for device in groups[k * len(groups) // stages]]
