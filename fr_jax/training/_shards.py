"""A training state whose arrays each process writes and reads by its own parts, into a folder that all of them see.

A part is what one device holds of an array; what several hold is written once, by the lowest of their processes. Parts
lie in ``parts-<step>-<id>/<process>`` beside the checkpoint of the step, whose index names them with their bounds and
checksums; only with the index is a checkpoint complete.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fr_jax.training._orbax import one_line
from fr_jax.training._saved_state import Damaged, checksum, is_asked_for, is_key, named_leaves, place, some, typed
from fr_jax.types import PyTree

Bounds = tuple[tuple[int, int], ...]
"""First and last row (exclusive) of a part along each axis."""


class Part(NamedTuple):
    """One part of an array: its name for people and its file, the process that writes it, where it is in the array."""

    name: str
    file: str
    process: int
    bounds: Bounds

    def meets(self, bounds: Bounds) -> Bounds | None:
        """What it has in common with other bounds; None for nothing."""
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.bounds, bounds, strict=True))
        return common if all(start < stop for start, stop in common) else None


def _bounds(index: Any, shape: Sequence[int]) -> Bounds:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def parts_of(arrays: Mapping[str, jax.Array]) -> dict[str, list[Part]]:
    """The parts of each array, the same in every process."""
    found: dict[str, list[Part]] = {}
    numbers = itertools.count()
    for name, array in arrays.items():
        holders: dict[Bounds, list[int]] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            holders.setdefault(_bounds(index, array.shape), []).append(device.process_index)
        found[name] = [
            Part(f"{name}@{j}", f"{next(numbers)}.npy", min(holders[at]), at) for j, at in enumerate(sorted(holders))
        ]
    return found


def own_parts(arrays: Mapping[str, jax.Array], parts: Mapping[str, Sequence[Part]]) -> dict[Part, np.ndarray]:
    """What this process writes, as host arrays."""
    held = {
        (name, _bounds(shard.index, array.shape)): shard.data
        for name, array in arrays.items()
        for shard in array.addressable_shards
    }
    mine = [(name, part) for name, each in parts.items() for part in each if part.process == jax.process_index()]
    found = jax.device_get([held[name, part.bounds] for name, part in mine])
    return {part: np.asarray(array) for (_, part), array in zip(mine, found, strict=True)}


def entry_of(parts: Sequence[Part], array: jax.Array, checksums: Mapping[str, int]) -> dict[str, Any]:
    """What the index says of an array and its parts."""
    return {"dtype": str(array.dtype), "parts": [part._asdict() | {"crc32": checksums[part.name]} for part in parts]}


def read_parts(
    index: Mapping[str, Any], template: PyTree, only: Sequence[str], folder: pathlib.Path, *, whole: bool
) -> dict[str, dict[Bounds, np.ndarray]]:
    """What this process needs of each array: host arrays by name and bounds, for its devices in ``template``.

    ``folder`` holds the parts. ``whole``: all of each array.

    Raises:
      Damaged: a part is missing, or its checksum differs.
    """
    leaves = {name: leaf for name, leaf in named_leaves(template)[0].items() if is_asked_for(name, only)}
    found: dict[str, dict[Bounds, np.ndarray]] = {}
    for name, leaf in leaves.items():
        entry = index["leaves"][name]
        if "parts" not in entry:
            continue
        size = lambda bounds: [stop - start for start, stop in bounds]
        found[name] = {bounds: np.empty(size(bounds), jnp.dtype(entry["dtype"])) for bounds in _needed(leaf, whole)}
        for part, crc in map(_part, entry["parts"]):
            shared = {bounds: both for bounds in found[name] if (both := part.meets(bounds)) is not None}
            if not shared:
                continue
            array = load_part(folder, part, entry["dtype"])
            if checksum(array) != crc:
                raise Damaged(f"the checksum differs for {part.name}")
            for bounds, both in shared.items():
                found[name][bounds][_within(both, bounds)] = array[_within(both, part.bounds)]
    return found


def _part(entry: Mapping[str, Any]) -> tuple[Part, int]:
    bounds = tuple((start, stop) for start, stop in entry["bounds"])
    return Part(entry["name"], entry["file"], entry["process"], bounds), entry["crc32"]


def _within(common: Bounds, bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(common, bounds, strict=True))


def _needed(leaf: Any, whole: bool) -> set[Bounds]:
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if whole or not isinstance(leaf, jax.Array):
        return {_bounds([slice(None)] * np.ndim(leaf), np.shape(leaf))}
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return {_bounds(index, leaf.shape) for index in indices}


def unpack_parts(
    index: Mapping[str, Any], found: Mapping[str, Mapping[Bounds, np.ndarray]], template: PyTree, only: Sequence[str]
) -> PyTree:
    """The state, with its arrays where those of ``template`` are; nothing is sent between processes."""
    leaves, treedef = named_leaves(template)
    placed = []
    for name, like in leaves.items():
        entry = index["leaves"].get(name, {})
        if not is_asked_for(name, only):
            placed.append(like)
        elif "value" in entry:
            placed.append(entry["value"])
        elif "parts" not in entry:  # without elements
            placed.append(like)
        else:
            placed.append(_placed(entry, found[name], like))
    return jax.tree_util.tree_unflatten(treedef, placed)


def _placed(entry: Mapping[str, Any], parts: Mapping[Bounds, np.ndarray], like: Any) -> Any:
    if jax.process_count() == len(parts) == 1:
        [value] = parts.values()
        return place(entry, value, like)
    stored = jax.random.key_data(like) if is_key(like) else like
    mine = stored.sharding.addressable_devices_indices_map(stored.shape).items()
    arrays = [jax.device_put(parts[_bounds(index, stored.shape)], device) for device, index in mine]
    array = jax.make_array_from_single_device_arrays(stored.shape, stored.sharding, arrays, dtype=stored.dtype)
    if not is_key(like) and not entry["weak"]:
        return array
    return jax.jit(lambda x: typed(entry, x, like), out_shardings=like.sharding)(array)


def write_parts(folder: pathlib.Path, arrays: Mapping[Part, np.ndarray]) -> None:
    """Writes what this process has, to the disk."""
    folder.mkdir(parents=True)
    for part, array in arrays.items():
        # As bytes: NumPy's files do not know bfloat16 and its like.
        with open(folder / part.file, "wb") as file:
            np.save(file, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            file.flush()
            os.fsync(file.fileno())


def load_part(folder: pathlib.Path, part: Part, dtype: str) -> np.ndarray:
    """Maps a part that some process has written; Damaged if that cannot be."""
    path = folder / str(part.process) / part.file
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array.view(jnp.dtype(dtype)).reshape([stop - start for start, stop in part.bounds])
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:  # NumPy reads a damaged header as Python source
        where = f"{folder.name}/{part.process}/{part.file}"
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({one_line(error)})"
        raise Damaged(f"{where} {problem}") from error


def folder_name(step: int, identity: str) -> str:
    """Of the parts of a step."""
    return f"parts-{step}-{identity}"


def forgotten(directory: pathlib.Path, newest: pathlib.Path) -> list[pathlib.Path]:
    """Folders of parts whose checkpoint is gone, or was replaced by that of ``newest``."""
    step_of = lambda path: path.name.split("-")[1]
    known = {path.name.removeprefix("damaged-") for path in directory.iterdir()}
    gone = [path for path in directory.glob("parts-*-*") if step_of(path) not in known]
    return gone + [path for path in directory.glob(f"parts-{step_of(newest)}-*") if path != newest]


def some_problems(problems: Sequence[str | None]) -> str | None:
    """One line of what went wrong in which process, or None."""
    return some([f"process {i}: {one}" for i, one in enumerate(problems) if one], "; ") or None
