"""Moves arrays between devices and processes, without waiting for them.

:func:`put` sends what is on some device, :func:`place` distributes what every process holds, :func:`to_first` and
:func:`from_first` collect and distribute checkpoints. Transfers use only ``jax.device_put`` between single devices,
which works over NCCL and over sockets. In a run of several processes all of them must call these functions with the
same leaves in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from fr_jax._placement import resting
from fr_jax.types import Array, PyTree

__all__ = ["from_first", "is_readable", "place", "put", "read", "to_first", "windows"]

WINDOW_BYTES = 64 * 2**20
"""Limit of what is on its way to process 0 at a time, because it also occupies the first device there."""


def put(x: PyTree, sharding: Sharding | None) -> PyTree:
    """Sends ``x`` to a stage, without waiting; with ``sharding`` None it stays where it is.

    A NumPy array is copied first: JAX may share its memory, and the caller may overwrite it with the next batch while
    a history still holds this one.

    Args:
      x: arrays of any shape, with a batch axis first if ``sharding`` splits it.
      sharding: that of the stage, from :func:`fr_jax.placement`, or :func:`replicated` of it.

    Example:
      >>> from fr_jax import placement
      >>> first, second = placement(2)
      >>> put({"h": np.zeros((4, 3))}, second)["h"].sharding == second
      True
    """

    def put_leaf(leaf: Array, sharding: Any = sharding) -> Array:
        if isinstance(sharding, NamedSharding):
            sharding = resting(sharding, np.shape(leaf))
        if not isinstance(leaf, jax.Array):
            return jax.device_put(np.array(leaf), sharding)
        traced = isinstance(leaf, jax.core.Tracer)
        if sharding is None or (not traced and leaf.committed and leaf.sharding == sharding):
            return leaf  # device_put returns it too, but takes a hundred times as long
        if sharding.is_fully_addressable or leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return _put_among_processes(leaf, sharding)

    return jax.tree.map(put_leaf, x)


def _put_among_processes(leaf: Array, sharding: Sharding) -> Array:
    """``device_put`` if devices of other processes are on both sides.

    JAX (0.10.2) refuses a transfer between devices of the same processes unless all are this process's. Each process
    therefore moves the parts that it holds, if any, and records where the rest is.
    """
    before, after = leaf.sharding.device_set, sharding.device_set
    processes = [{device.process_index for device in devices} for devices in (before, after)]
    if before == after or processes[0] != processes[1]:
        return jax.device_put(leaf, sharding)
    held = {repr(shard.index): shard.data for shard in leaf.addressable_shards}
    wanted = sharding.addressable_devices_indices_map(leaf.shape)
    if missing := [device for device, index in wanted.items() if repr(index) not in held]:
        raise ValueError(
            f"an array over the devices {sorted(before, key=str)} cannot be sent to {sorted(after, key=str)}: "
            f"{missing[0]} needs a part that its process does not hold. Give every stage the same number of devices, "
            "split over the processes in the same way."
        )
    moved = [jax.device_put(held[repr(index)], device) for device, index in wanted.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, moved, dtype=leaf.dtype)


def place(x: PyTree, sharding: Sharding | None, *, copy: bool = True) -> PyTree:
    """Like :func:`put`, for values that every process holds, such as a seed's key; also onto devices of others.

    Args:
      x: arrays of this process.
      sharding: on the devices of any processes.
      copy: whether NumPy arrays are copied; if not, the caller must never write to them again.

    Example:
      >>> from fr_jax import placement
      >>> first, second = placement(2)
      >>> place(jax.random.key(0), second).sharding == second
      True
    """
    if sharding is None or sharding.is_fully_addressable:
        lying = lambda leaf: jax.device_put(leaf, resting(sharding, np.shape(leaf)))
        return put(x, sharding) if copy else jax.tree.map(lying, x)

    # device_put refuses to send an array of one process to a device of another, but that process already has it.
    def place_leaf(leaf: Array | np.ndarray | np.generic, sharding: Any = sharding) -> Array:
        sharding = resting(sharding, np.shape(leaf))
        if not isinstance(leaf, jax.Array):
            leaf = np.array(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype), copy=copy or None)
        mine = sharding.addressable_devices_indices_map(leaf.shape).items()
        parts = [jax.device_put(leaf[index], device) for device, index in mine]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts, dtype=leaf.dtype)

    return jax.tree.map(place_leaf, x)


def is_readable(array: Array) -> bool:
    """Whether this process holds all of ``array``."""
    return array.is_fully_addressable or (array.is_fully_replicated and bool(array.addressable_shards))


def read(array: Array) -> np.ndarray:
    """The value of a readable array; waits for it."""
    return np.asarray(array if array.is_fully_addressable else array.addressable_data(0))


def to_first(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Collects ``arrays``, by name and on devices of any processes, as host arrays in process 0; waits for them.

    Returns:
      In process 0 a host array per name; in the others an empty dictionary.
    """
    first = jax.process_index() == 0
    found = {}
    for window in windows({name: array.nbytes for name, array in arrays.items()}):
        sent = {name: _parts_to_first(arrays[name]) for name in window}
        if first:
            found |= {name: _assembled(arrays[name], parts) for name, parts in sent.items()}
    return found


def from_first(value: np.ndarray | None, like: Array) -> Array:
    """Distributes a host array of process 0 (``None`` in the others) with the sharding, shape and dtype of ``like``."""
    if like.is_fully_addressable and jax.process_count() == 1:
        return jax.device_put(value, like.sharding)
    source = SingleDeviceSharding(_first_device())
    shape = like.sharding.shard_shape(like.shape)
    mine = []
    for device, index in like.sharding.devices_indices_map(like.shape).items():
        here = [] if value is None else [jax.device_put(np.array(value[index]), source)]
        part = jax.make_array_from_single_device_arrays(shape, source, here, dtype=like.dtype)
        arrived = put(part, SingleDeviceSharding(device))
        if device.process_index == jax.process_index():
            mine.append(arrived)
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, mine, dtype=like.dtype)


def windows(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, in groups whose sizes (bytes) add up to at most :data:`WINDOW_BYTES`, or of a single name."""
    window: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if window and size + nbytes > WINDOW_BYTES:
            yield window
            window, size = [], 0
        window.append(name)
        size += nbytes
    if window:
        yield window


def _parts_to_first(array: Array) -> list[tuple[Any, Array]]:
    """Each different part of ``array`` once, with its index, on its way to process 0."""
    if is_held_by_first(array.sharding):
        return [(..., array)] if jax.process_index() == 0 else []
    target = SingleDeviceSharding(_first_device())
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    shape = array.sharding.shard_shape(array.shape)
    parts = []
    for index, device in _one_device_per_part(array.sharding, array.shape):
        here = [shards[device]] if device in shards else []
        part = jax.make_array_from_single_device_arrays(shape, SingleDeviceSharding(device), here, dtype=array.dtype)
        parts.append((index, put(part, target)))
    return parts


def is_held_by_first(sharding: Sharding) -> bool:
    """Whether process 0 holds everything that ``sharding`` places."""
    at_first = [device.process_index == 0 for device in sharding.device_set]
    return any(at_first) if sharding.is_fully_replicated else all(at_first)


def _one_device_per_part(sharding: Sharding, shape: tuple[int, ...]) -> Iterable[tuple[Any, jax.Device]]:
    chosen: dict[str, tuple[Any, jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        chosen.setdefault(repr(index), (index, device))
    return chosen.values()


def _assembled(array: Array, parts: list[tuple[Any, Array]]) -> np.ndarray:
    if len(parts) == 1:
        return read(parts[0][1])
    whole = np.empty(array.shape, array.dtype)
    for index, part in parts:
        whole[index] = read(part)
    return whole


def _first_device() -> jax.Device:
    return next(device for device in jax.devices() if device.process_index == 0)
