"""The memory of a training method: on each device at the peak of a step, and for each stage between steps.

A step is a list of jitted calls (:mod:`fr_jax.diagnostics.memory.step_calls`). While call i runs, a device holds

    live_i   buffers that existed before call i and are still to be read, by this or a later call or by the caller
    out_i    the call's outputs, except those in donated memory
    temp_i   what XLA needs inside the call, from the memory analysis of the compiled function

and its peak is max_i (live_i + out_i + temp_i). The caller holds the old state until the step returns. Nothing runs and
nothing is allocated, so a network that fits on no machine can be examined on any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from fr_jax.diagnostics.memory.step_calls import Buffer, Call, Progress, StepCalls, step_calls
from fr_jax.types import Algorithm, Batch

__all__ = ["KINDS", "CallMemory", "DeviceMemory", "MemoryReport", "StageMemory", "device_peaks", "step_memory"]

KINDS = {
    "parameters": "weights",
    "optimizer": "states of the optimizers",
    "statistics": "running statistics, keys and counts",
    "history": "what the state keeps of past mini-batches: features, VJPs, gradients in flight",
    "batch": "the mini-batch",
    "residuals": "what a step makes and uses up: VJPs, features, gradients",
    "temporaries": "what XLA needs inside a function, such as the activations of a replay",
}
ACTIVATIONS = ("history", "batch", "residuals", "temporaries")
_KIND_OF_FIELD = {"params": "parameters", **dict.fromkeys(("opt_state", "last_update"), "optimizer")}
_KIND_OF_FIELD |= dict.fromkeys(("model_state", "streams", "stream"), "statistics")


class StageMemory(NamedTuple):
    """Bytes that one stage holds between steps, on each of its devices, by kind (:data:`KINDS`)."""

    parameters: int
    optimizer: int
    statistics: int
    history: int


class DeviceMemory(NamedTuple):
    """One device at the moment of a step at which it holds the most."""

    device: str  # such as cpu:0
    stages: tuple[int, ...]  # those on it, k = 1..K
    peak: dict[str, int]  # bytes by kind at that moment
    during: str  # the function that runs then
    between_steps: dict[str, int]  # bytes by kind that the new state holds

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())

    @property
    def activations(self) -> int:
        """Bytes at the peak without weights, optimizer and statistics: the quantity of table 1 of the paper."""
        return sum(self.peak[kind] for kind in ACTIVATIONS)


class CallMemory(NamedTuple):
    """A function that the step issues: its name, its first device, and bytes there."""

    name: str
    device: str
    live: int  # when it starts, including its inputs
    inputs: int
    outputs: int
    aliased: int  # the part of the outputs in donated inputs
    temporaries: int


class MemoryReport(NamedTuple):
    """The memory of one training method: by device (sorted), by stage, and by function in the order of issue."""

    devices: tuple[DeviceMemory, ...]
    stages: tuple[StageMemory, ...]
    calls: tuple[CallMemory, ...]

    @property
    def total(self) -> int:
        """Bytes: the sum over devices of their peaks, which need not be at the same time."""
        return sum(device.total for device in self.devices)

    @property
    def activations(self) -> int:
        """Bytes: the same without weights, optimizer and statistics."""
        return sum(device.activations for device in self.devices)


def step_memory(
    algorithm: Algorithm, batch: Batch, *, progress: Progress | None = None, analyses: dict[Any, Any] | None = None
) -> MemoryReport:
    """Memory of a step in which all stages update, from XLA's analysis of the functions that it issues.

    It is what the program requests for the backend in use: XLA plans differently for a CPU and for a GPU. A device may
    use more: an allocator rounds up, a convolution library takes workspace, and a host that runs several steps ahead
    keeps their features alive. :func:`device_peaks` reads the device's own count after a run.

    Arguments and errors as for :func:`fr_jax.diagnostics.memory.step_calls.step_calls`; the programs examine methods
    with ``donate=True``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fr_jax as fr
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
      >>> fit = fr.features_replay(stages, lambda y, t: jnp.mean(y), optax.sgd(0.1), donate=True)
      >>> batch = fr.Batch(jax.ShapeDtypeStruct((4, 784), "float32"), jax.ShapeDtypeStruct((4,), "int32"))
      >>> [stage.history for stage in step_memory(fit, batch).stages]  # an image batch and a gradient, float32
      [12672, 0]
    """
    step = step_calls(algorithm, batch, progress=progress, analyses=analyses)
    # The devices of a stage are those of its keys: every stage has some, and weights it may lack.
    streams = [jax.tree.leaves(stream) for stream in step.state.streams]
    stages_of = [set().union(*(key.sharding.device_set for key in keys)) for keys in streams]
    after = {buffer: _kind(path) for path, buffer in jax.tree.leaves_with_path(step.new_state)}
    devices = []
    for device, (during, peak) in sorted(_peaks(step).items(), key=lambda item: item[0].id):
        held = Counter(dict.fromkeys(KINDS, 0))
        for buffer, kind in after.items():
            held[kind] += buffer.nbytes if device in buffer.sharding.device_set else 0
        stages = tuple(k for k, there in enumerate(stages_of, start=1) if device in there)
        devices.append(DeviceMemory(_name(device), stages, peak, during, dict(held)))
    calls = tuple(_call_memory(call, live) for call, live in _alive(step))
    return MemoryReport(tuple(devices), _stages(step.state), calls)


def device_peaks(devices: Iterable[jax.Device] | None = None) -> dict[str, int | None]:
    """``{"gpu:0": bytes}``: the most that each device (of this process) had in use since the program started.

    None if the backend does not count (a CPU). It waits for nothing.
    """
    devices = jax.local_devices() if devices is None else devices
    return {_name(device): (device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices}


def _name(device: jax.Device) -> str:
    return f"{device.platform}:{device.id}"


def _call_memory(call: Call, live: list[Buffer]) -> CallMemory:
    device = min(call.devices, key=lambda device: device.id)
    # A buffer that is read twice is there once.
    on = lambda buffers: sum(b.nbytes for b in dict.fromkeys(buffers) if device in b.sharding.device_set)
    sizes = (on(live), on(call.inputs), on(call.outputs), call.aliased, call.temporaries)
    return CallMemory(call.name, _name(device), *sizes)


def _kind(path: tuple[Any, ...]) -> str:
    """The kind of a leaf of a state, from the names of the fields that lead to it."""
    names = [getattr(entry, "name", None) for entry in path]
    if names[0] in ("history", "deltas"):
        return "history"
    return next((_KIND_OF_FIELD[name] for name in names if name in _KIND_OF_FIELD), "history")


def _stages(state: Any) -> tuple[StageMemory, ...]:
    # A field of a state has one entry per stage: path[1] is the stage. What a method keeps once, such as the progress
    # of auxiliary_coordinates, counts for the last stage.
    K = len(state.params)
    held = [Counter() for _ in range(K)]
    for path, buffer in jax.tree.leaves_with_path(state):
        held[getattr(path[1], "idx", K - 1)][_kind(path)] += buffer.nbytes
    return tuple(StageMemory(*(one[kind] for kind in StageMemory._fields)) for one in held)


def _alive(step: StepCalls) -> Iterator[tuple[Call, list[Buffer]]]:
    """Each call with the buffers that are alive when it starts, including its inputs."""
    end = len(step.calls)
    last_use = {buffer: i for i, call in enumerate(step.calls) for buffer in call.inputs}
    # The caller holds the old state, except for what it has donated, and receives the new one.
    last_use |= dict.fromkeys(jax.tree.leaves((step.state, step.batch)), end)
    last_use |= {buffer: i for i, call in enumerate(step.calls) for buffer in call.donated}
    last_use |= dict.fromkeys(jax.tree.leaves((step.new_state, step.info)), end)
    live = list(dict.fromkeys(jax.tree.leaves((step.state, step.batch))))
    for i, call in enumerate(step.calls):
        yield call, live
        live = [buffer for buffer in (*live, *call.outputs) if last_use.get(buffer, -1) > i]


def _peaks(step: StepCalls) -> dict[jax.Device, tuple[str, dict[str, int]]]:
    """For each device, the call at which it holds the most, and the bytes by kind."""
    kinds = {buffer: "residuals" for call in step.calls for buffer in (*call.inputs, *call.outputs)}
    for state in (step.new_state, step.state):  # a buffer in both is of its kind in the old one
        kinds |= {buffer: _kind(path) for path, buffer in jax.tree.leaves_with_path(state)}
    kinds |= dict.fromkeys(jax.tree.leaves(step.batch), "batch")
    peaks: dict[jax.Device, tuple[str, dict[str, int]]] = {}
    for call, live in _alive(step):
        given = set(call.donated)
        for device in call.devices:
            now = Counter(dict.fromkeys(KINDS, 0))
            left_over = -call.aliased  # outputs replace donated inputs as far as they fit; XLA keeps the rest
            for buffer in (*live, *call.outputs):
                size = buffer.nbytes if device in buffer.sharding.device_set else 0
                if buffer in given:
                    left_over += size
                else:
                    now[kinds[buffer]] += size
            now["temporaries"] += call.temporaries + max(left_over, 0)
            if device not in peaks or sum(now.values()) > sum(peaks[device][1].values()):
                peaks[device] = call.name, dict(now)
    return peaks
