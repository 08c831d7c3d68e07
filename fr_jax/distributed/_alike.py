"""Whether the processes of a run are given the same mini-batches, of which each uses only what its stages need.

The inputs come from the processes with the first stage and the targets from those with the last: if each process
shuffles for itself, they do not belong together, and nothing else would show it. So each process leaves a checksum of
what it was given, seldom, and looks later whether the others' are the same. It never waits for them.
"""

from __future__ import annotations

import collections
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from fr_jax.distributed import _coordination
from fr_jax.distributed._coordination import GroupError

__all__ = ["Comparison", "comparison", "from_rows", "rows"]

SAMPLE = 2**20  # numbers of an array that its checksum is of
SELDOM = 1024  # mini-batches between two checksums; the first ones more often: 0, 1, 2, 4, 8, ...
LOOK_EVERY = 16

_made: collections.Counter[tuple[int, ...]] = collections.Counter()


def rows(sharding: Sharding, batch_size: int) -> np.ndarray:
    """The rows of a mini-batch that this process needs to have, for a loader that reads only these.

    The inputs of a mini-batch are needed where the first stage is, its targets where the last one is: pass
    ``placement[0]`` and ``placement[-1]``. :func:`from_rows` makes arrays of what was read.

    Args:
      sharding: of a stage, from :func:`fr_jax.placement`.
      batch_size: B.

    Returns:
      int64 ``(n,)``, increasing; empty if this process has no device of the stage.

    Example:
      >>> import fr_jax as fr
      >>> fr.distributed.rows(fr.placement(2)[0], 4)
      array([0, 1, 2, 3])
    """
    here = sharding.addressable_devices_indices_map((batch_size,)).values()
    parts = [np.arange(batch_size)[index] for index in here if index is not None]
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))


def from_rows(own: Any, sharding: Sharding, batch_size: int) -> Any:
    """The inputs or the targets of a :class:`fr_jax.Batch`, of which this process has its own rows.

    All processes call it, also one that needs no rows; nothing is sent between them.

    Args:
      own: NumPy arrays ``(n, ...)``, or a pytree of them: the rows of :func:`rows`, in their order.
      sharding: as for :func:`rows`.
      batch_size: B.

    Returns:
      Arrays ``(B, ...)``, each row on its devices.

    Raises:
      ValueError: the number of rows is not that of :func:`rows`.

    Example:
      >>> import numpy as np, fr_jax as fr
      >>> first, last = fr.placement(2)
      >>> images = np.ones((len(fr.distributed.rows(first, 4)), 8, 8, 3), np.float32)  # such as from a file
      >>> fr.distributed.from_rows(images, first, 4).shape
      (4, 8, 8, 3)
    """
    needed = rows(sharding, batch_size)

    def put(x: np.ndarray) -> jax.Array:
        if len(x) != len(needed):
            raise ValueError(
                f"from_rows() was given {len(x)} rows; this process needs {len(needed)} of the {batch_size}: those of "
                "fr_jax.distributed.rows(sharding, batch_size), in that order."
            )
        shape, dtype = (batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
        places = sharding.addressable_devices_indices_map(shape).items()
        parts = [
            jax.device_put(x[np.searchsorted(needed, np.arange(batch_size)[index[0]])].astype(dtype), device)
            for device, index in places
            if index is not None
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)

    return jax.tree.map(put, own)


def comparison(shardings: Sequence[Sharding]) -> Comparison | None:
    """What compares the mini-batches of an algorithm, or None where one process has all of its stages."""
    members = tuple(sorted({device.process_index for one in shardings for device in one.device_set}))
    if len(members) == 1 or jax.process_index() not in members:
        return None
    _made[members] += 1  # all of them make their algorithms in the same order
    return Comparison(members, jax.process_index(), f"{'-'.join(map(str, members))}/{_made[members]}")


class Comparison:
    """The checksums of one algorithm in process ``index`` of the ``members``; ``name`` is the same in all of them."""

    def __init__(self, members: Sequence[int], index: int, name: str) -> None:
        self._others = [member for member in members if member != index]
        self._index, self._name, self._first = index, name, members[0]
        self._count = self._inits = 0
        self._open: dict[str, dict[str, Any]] = {}

    def init(self, key: Any, batch: Any) -> None:
        """Takes what ``init`` is given."""
        typed = isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        seed = {"key": np.ravel(jax.random.key_data(key)).tolist()} if typed else {}
        self._tell(f"init {self._inits}", seed | _checksums(batch))
        self._inits += 1

    def step(self, batch: Any) -> None:
        """Takes a mini-batch.

        Raises:
          GroupError: another process was given another one, now or before.
        """
        t, self._count = self._count, self._count + 1
        if self._open and (t < LOOK_EVERY or t % LOOK_EVERY == 0):
            self._look()
        if t % SELDOM == 0 or (t < SELDOM and t & (t - 1) == 0):
            self._tell(f"step {t}", _checksums(batch))

    def _key(self, when: str, member: int) -> str:
        return f"fr_jax/alike/{self._name}/{when.replace(' ', '/')}/{member}"

    def _tell(self, when: str, sums: dict[str, Any]) -> None:
        self._open[when] = sums
        _coordination.client().key_value_set(self._key(when, self._index), json.dumps(sums))

    def _look(self) -> None:
        for when, mine in list(self._open.items()):
            found = {member: self._told(when, member) for member in self._others}
            for member, theirs in found.items():
                if theirs is not None and (name := _different(mine, theirs)):
                    raise self._error(when, member, name)
            if None not in found.values():
                del self._open[when]

    def _told(self, when: str, member: int) -> dict[str, Any] | None:
        try:
            return json.loads(_coordination.client().key_value_try_get(self._key(when, member)))
        except jax.errors.JaxRuntimeError:  # it has not come so far
            return None

    def _error(self, when: str, member: int, name: str) -> GroupError:
        a, b = sorted((self._index, member))
        call = "init()" if when.startswith("init") else f"step() number {when.removeprefix('step ')} (from 0)"
        return GroupError(
            f"process {b} gave {call} another {name} than process {a}. Give all processes the same key and the same "
            "mini-batches: shuffle with the same seed in each. For a loader that reads only what its process needs "
            "there are fr_jax.distributed.rows and from_rows.",
            2,
            reported=self._index != self._first,
        )


def _checksums(batch: Any) -> dict[str, Any]:
    """One number for each array of inputs, targets and index; None for what the process has placed itself."""
    parts: Mapping[str, Any] = batch._asdict()
    return {name: [_checksum(leaf) for leaf in jax.tree.leaves(part)] for name, part in parts.items()}


def _checksum(leaf: Any) -> int | None:
    """CRC32 of numbers spread evenly over an array of the host, or of JAX's on no certain device."""
    is_jax = isinstance(leaf, jax.Array)
    if is_jax and (leaf.committed or not leaf.is_ready()):  # type: ignore[attr-defined]  # ArrayImpl has it
        return None
    if not (is_jax or isinstance(leaf, np.ndarray)) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return None
    flat = np.asarray(leaf).reshape(-1)
    return zlib.crc32(flat[:: max(1, flat.size // SAMPLE)].tobytes())


def _different(mine: Mapping[str, list], theirs: Mapping[str, list]) -> str | None:
    """The name of what differs, as far as both could be read."""
    for name, sums in mine.items():
        pairs = zip(sums, theirs.get(name, []), strict=False)
        if any(a != b for a, b in pairs if None not in (a, b)):
            return name
    return None
