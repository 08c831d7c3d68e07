"""Moves arrays between devices and processes, without waiting for them.

Only ``jax.device_put`` between single devices is used, which works over NCCL and over sockets alike. In a
run of several processes all of them must call these functions with the same leaves in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from fr_jax.types import Array, PyTree

__all__ = ["from_first", "is_readable", "place", "put", "put_whole", "read", "to_first", "windows"]

WINDOW_BYTES = 64 * 2**20
"""How much may be on its way to process 0 at a time: it also occupies its first device."""


def place(x: PyTree, sharding: Sharding | None) -> PyTree:
    """Like :func:`put`, and also onto devices of another process, for what every process holds alike (a seed's key).

    Example:
      >>> from fr_jax import placement
      >>> first, second = placement(2)
      >>> place(jax.random.key(0), second).sharding == second
      True
    """
    if sharding is None or sharding.is_fully_addressable:
        return put(x, sharding)
    # device_put refuses to leave the process. The jit is made afresh each time: calling one a second time with arrays
    # of this process for a device of another ends in a segmentation fault (jax 0.10.2).
    return jax.jit(lambda *leaves: leaves, out_shardings=sharding)(x)[0]


def put(x: PyTree, sharding: Sharding | None) -> PyTree:
    """Sends ``x`` to a stage, without waiting; where ``sharding`` is None it stays where it is.

    A NumPy array is copied: JAX may share its memory, and a history still reads it when the caller has long since
    written the next batch there. In a run of several processes all of them must call this for the same array.

    Args:
      x: arrays of any shape, with a batch axis first where ``sharding`` splits it.
      sharding: the stage's, from :func:`placement`, or :func:`replicated` of it.

    Example:
      >>> from fr_jax import placement
      >>> first, second = placement(2)
      >>> put({"h": np.zeros((4, 3))}, second)["h"].sharding == second
      True
    """

    def put_leaf(leaf: Array) -> Array:
        if not isinstance(leaf, jax.Array):
            return jax.device_put(np.array(leaf), sharding)
        traced = isinstance(leaf, jax.core.Tracer)
        if sharding is None or (not traced and leaf.committed and leaf.sharding == sharding):
            return leaf  # device_put returns it too, a hundred times as slowly
        if sharding.is_fully_addressable or leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return _put_among_processes(leaf, sharding)

    return jax.tree.map(put_leaf, x)


def _put_among_processes(leaf: Array, sharding: Sharding) -> Array:
    """``device_put`` where this process has not all devices of either side.

    Between the devices of one and the same process JAX (0.10.2) refuses it to every other process, although these have
    nothing to do: each moves what it holds, which may be nothing, and remembers where the rest is.
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


def is_readable(array: Array) -> bool:
    """Whether this process holds all of ``array``."""
    return array.is_fully_addressable or (array.is_fully_replicated and bool(array.addressable_shards))


def read(array: Array) -> np.ndarray:
    """The value of a readable array; waits for it."""
    return np.asarray(array if array.is_fully_addressable else array.addressable_data(0))


def put_whole(value: np.ndarray | np.generic, sharding: Sharding) -> Array:
    """A host array, which every process holds alike, on the devices of ``sharding``, whichever process has them."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: np.asarray(value)[index], dtype=value.dtype
    )


def to_first(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """The values of ``arrays`` in process 0; nothing in the others.

    Args:
      arrays: by name, on devices of any processes.

    Returns:
      In process 0 the same names, as host arrays; in the others an empty dictionary.
    """
    first = jax.process_index() == 0
    found = {}
    for window in windows({name: array.nbytes for name, array in arrays.items()}):
        sent = {name: _pieces_to_first(arrays[name]) for name in window}
        if first:
            found |= {name: _assemble(arrays[name], pieces) for name, pieces in sent.items()}
    return found


def windows(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, in groups of no more than :data:`WINDOW_BYTES` where their sizes (bytes) allow it."""
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


def _pieces_to_first(array: Array) -> list[tuple[Any, Array]]:
    """Each different piece of ``array`` once, with its place in the whole, on its way to process 0."""
    if is_held_by_first(array.sharding):
        return [(..., array)] if jax.process_index() == 0 else []
    target = _first_device()
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    shape = array.sharding.shard_shape(array.shape)
    pieces = []
    for index, device in _one_device_a_piece(array.sharding, array.shape):
        here = [shards[device]] if device in shards else []
        piece = jax.make_array_from_single_device_arrays(shape, SingleDeviceSharding(device), here, dtype=array.dtype)
        pieces.append((index, put(piece, SingleDeviceSharding(target))))
    return pieces


def is_held_by_first(sharding: Sharding) -> bool:
    """Whether process 0 holds all that ``sharding`` places, without asking another."""
    if sharding.is_fully_replicated:
        return any(device.process_index == 0 for device in sharding.device_set)
    return all(device.process_index == 0 for device in sharding.device_set)


def _one_device_a_piece(sharding: Sharding, shape: tuple[int, ...]) -> Iterable[tuple[Any, jax.Device]]:
    chosen: dict[str, tuple[Any, jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        chosen.setdefault(repr(index), (index, device))
    return chosen.values()


def _assemble(array: Array, pieces: list[tuple[Any, Array]]) -> np.ndarray:
    if len(pieces) == 1:
        return read(pieces[0][1])
    whole = np.empty(array.shape, array.dtype)
    for index, piece in pieces:
        whole[index] = read(piece)
    return whole


def from_first(value: np.ndarray | None, like: Array) -> Array:
    """A host array of process 0 (``None`` in the others) where ``like`` is, with its shape and dtype."""
    if like.is_fully_addressable and jax.process_count() == 1:
        return jax.device_put(value, like.sharding)
    source = SingleDeviceSharding(_first_device())
    shape = like.sharding.shard_shape(like.shape)
    mine = []
    for device, index in like.sharding.devices_indices_map(like.shape).items():
        here = [] if value is None else [jax.device_put(np.array(value[index]), source)]
        piece = jax.make_array_from_single_device_arrays(shape, source, here, dtype=like.dtype)
        arrived = put(piece, SingleDeviceSharding(device))
        if device.process_index == jax.process_index():
            mine.append(arrived)
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, mine, dtype=like.dtype)


def _first_device() -> jax.Device:
    return next(device for device in jax.devices() if device.process_index == 0)
