"""A training state as named host arrays and a JSON index, and back: what a checkpoint holds, without the files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fr_jax import distributed
from fr_jax._arrays import from_first, to_first, windows
from fr_jax.types import PyTree

FORMAT, FORMAT_OF_PARTS = 1, 2
_SHOWN = 4


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none that fits can be read; the message says what to do."""


class Damaged(Exception):
    """A checkpoint cannot be trusted; the message is the reason."""


def pack(step: int, state: PyTree, metadata: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Copies a state to the host -> its arrays by name (in process 0 only), and the JSON index.

    The state is any pytree of arrays, typed keys, int, float, bool and str. The index is ``{"format", "step",
    "leaves", "metadata", "crc32"}``; ``leaves`` says for each name what it is, and its checksum or, for a Python
    number, its value. Arrays of other processes are sent to process 0; all processes must call this.

    Raises:
      CheckpointError: for a leaf that cannot be stored.
      TypeError: for metadata that JSON cannot hold.
    """
    entries, on_device = described(state)
    if jax.process_count() > 1:
        on_device = to_first(on_device)
    arrays = {name: np.asarray(array) for name, array in jax.device_get(on_device).items()}
    for name, array in arrays.items():
        entries[name]["crc32"] = checksum(array)
    return arrays, sealed(step, entries, metadata)


def described(state: PyTree) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What the index says of each leaf without its array; and the arrays, of typed keys their data."""
    leaves, _ = named_leaves(state)
    entries: dict[str, dict[str, Any]] = {name: {"kind": _kind(name, leaf)} for name, leaf in leaves.items()}
    on_device = {}
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            entries[name]["value"] = leaf
        elif leaf.size:  # orbax refuses arrays without elements, and there is nothing in them to store
            on_device[name] = jax.random.key_data(leaf) if is_key(leaf) else leaf
            entries[name]["weak"] = bool(getattr(leaf, "weak_type", False))
    on_host = [name for name, leaf in on_device.items() if not isinstance(leaf, jax.Array)]
    if on_host and jax.process_count() > 1:
        raise CheckpointError(f"{some(on_host)}: a run of several processes can store arrays of JAX only.")
    return entries, on_device


def sealed(
    step: int, entries: dict[str, dict[str, Any]], metadata: Mapping[str, Any], parts: str | None = None
) -> dict[str, Any]:
    """The index with its checksum; ``parts`` is the folder of the arrays' parts, if they are not beside the index."""
    metadata = json.loads(json.dumps(dict(metadata)))
    index = {"format": FORMAT, "step": step, "leaves": entries, "metadata": metadata}
    if parts is not None:
        index |= {"format": FORMAT_OF_PARTS, "parts": parts}
    return index | {"crc32": _text_checksum(index)}


def check_index(index: Any) -> dict[str, Any]:
    """The index as it was written; Damaged if its checksum does not hold, CheckpointError for another format."""
    if not isinstance(index, dict):
        raise Damaged("its index is not a JSON object")
    index = dict(index)
    if index.pop("crc32", None) != _text_checksum(index):
        raise Damaged("the checksum of its index differs")
    if index["format"] not in (FORMAT, FORMAT_OF_PARTS):
        raise CheckpointError(
            f"this checkpoint has format {index['format']}, and this version of fr_jax reads formats {FORMAT} and "
            f"{FORMAT_OF_PARTS}: resume with the version that wrote it, or start in another folder."
        )
    return index


def check_fit(index: Mapping[str, Any], template: PyTree, only: Sequence[str] = ()) -> None:
    """A CheckpointError that names the first few differences in names, shapes and dtypes from ``template``."""
    fields = {*getattr(template, "_fields", ()), *(template if isinstance(template, Mapping) else ())}
    if not set(only) <= fields:
        raise ValueError(
            f"only = {only!r} was given; it must be of the fields of the state: {', '.join(sorted(fields))}."
        )
    leaves, entries = (
        {name: one for name, one in found.items() if is_asked_for(name, only)}
        for found in (named_leaves(template)[0], index["leaves"])
    )
    differences = [
        f"{name} ({entries[name]['kind']}) is only in the checkpoint" for name in entries if name not in leaves
    ]
    for name, leaf in leaves.items():
        here = _kind(name, leaf)
        if name not in entries:
            differences.append(f"{name} ({here}) is not in the checkpoint")
        elif entries[name]["kind"] != here:
            differences.append(f"{name} is {entries[name]['kind']} in the checkpoint and {here} here")
    if differences:
        raise CheckpointError(
            f"it belongs to another run: {some(differences, '; ')}. Resume with the settings that wrote it (model, K, "
            "method, optimizer, batch size, dtype), or start in another folder."
        )


def array_names(index: Mapping[str, Any]) -> list[str]:
    """The names of the leaves that :func:`pack` gave as arrays."""
    return [name for name, entry in index["leaves"].items() if "crc32" in entry]


def check_arrays(index: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Damaged if an array that was read is missing, or its checksum is not the index's."""
    names, entries = array_names(index), index["leaves"]
    if missing := [name for name in names if name not in arrays]:
        raise Damaged(f"missing: {some(missing)}")
    if differing := [name for name in names if checksum(arrays[name]) != entries[name]["crc32"]]:
        raise Damaged(f"the checksum differs for {some(differing)}")


def unpack(
    index: Mapping[str, Any], arrays: Mapping[str, np.ndarray], template: PyTree, only: Sequence[str] = ()
) -> PyTree:
    """The state that was packed, with its arrays where those of ``template`` are; what is not asked for is from there.

    :func:`check_fit` and :func:`check_arrays` come before. In a run of several processes only process 0 has the
    ``arrays``, and all must call this.
    """
    entries = index["leaves"]
    leaves, treedef = named_leaves(template)
    placed: list[Any] = []
    for window in windows({name: getattr(like, "nbytes", 0) for name, like in leaves.items()}):
        put = lambda name: place(entries[name], arrays.get(name), leaves[name])
        placed += [put(name) if is_asked_for(name, only) else leaves[name] for name in window]
        if jax.process_count() > 1:  # what has arrived no longer occupies process 0's first device
            here = [one for one in placed[-len(window) :] if isinstance(one, jax.Array) and one.addressable_shards]
            jax.block_until_ready(here)
            distributed.group().exchange(None)
    return jax.tree_util.tree_unflatten(treedef, placed)


def is_asked_for(name: str, only: Sequence[str]) -> bool:
    return not only or name.partition("/")[0] in only


def some(items: Sequence[Any], separator: str = ", ") -> str:
    """The first few of ``items``, and how many more there are."""
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(map(str, items[:_SHOWN])) + more


def named_leaves(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """The leaves by readable name, in tree order; no name may be a folder of another."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named: dict[str, Any] = {}
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if name in named:
            raise CheckpointError(f"two leaves of the state are both named {name!r}; rename a key that holds a '/'.")
        named[name] = leaf
    for name in named:
        parents = (name[:at] for at, character in enumerate(name) if character == "/")
        if clash := next((parent for parent in parents if parent in named), None):
            raise CheckpointError(f"{clash!r} is a leaf of the state and a part of {name!r}; rename one of them.")
    return named, treedef


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(name: str, leaf: Any) -> str:
    """What a leaf is, for people and for comparison: ``float32[3,4]``, ``key<threefry2x32>[]``, ``int``."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        dtype = f"key<{jax.random.key_impl(cast(jax.Array, leaf))}>" if is_key(leaf) else str(leaf.dtype)
        return f"{dtype}[{','.join(map(str, leaf.shape))}]"
    if type(leaf) in (bool, int, float, str):
        return type(leaf).__name__
    raise CheckpointError(
        f"{name} of the state is a {type(leaf).__name__}, which a checkpoint cannot hold: arrays, keys, int, float, "
        "bool and str are possible."
    )


def place(entry: Mapping[str, Any], value: np.ndarray | None, like: Any) -> Any:
    """One leaf as it was saved, where ``like`` is, and committed as ``like`` is, so that no jit compiles again."""
    if "value" in entry:
        return entry["value"]
    if "crc32" not in entry and "parts" not in entry:  # without elements
        return like
    if isinstance(like, np.ndarray | np.generic):
        return value if value is None or isinstance(like, np.ndarray) else value[()]
    if jax.process_count() > 1:
        return _place_among_processes(entry, value, like)
    assert value is not None
    with jax.default_device(min(like.devices(), key=lambda device: device.id)):
        array = typed(entry, jnp.asarray(value), like)
        return jax.device_put(array, like.sharding) if like.committed else array


def typed(entry: Mapping[str, Any], array: Any, like: Any) -> Any:
    """A typed key or a weakly typed array from what was stored of it."""
    if is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    if entry["weak"]:
        # `.at[].set` keeps the weak type of what it writes to; nothing else public makes a weakly typed array.
        return jnp.broadcast_to(jnp.asarray(array.dtype.type(0).item()), array.shape).at[...].set(array)
    return array


def _place_among_processes(entry: Mapping[str, Any], value: np.ndarray | None, like: Any) -> Any:
    stored = jax.random.key_data(like) if is_key(like) else like
    array = from_first(value, stored)
    if not is_key(like) and not entry["weak"]:
        return array
    return jax.jit(lambda x: typed(entry, x, like), out_shardings=like.sharding)(array)


def checksum(array: np.ndarray) -> int:
    start = zlib.crc32(f"{array.dtype}{array.shape}".encode())
    # As bytes: zlib does not take bfloat16 and its like (ml_dtypes).
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)


def _text_checksum(index: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())
