"""Values of arrays that lie in some process of a run, in all of them."""

from __future__ import annotations

import base64
from typing import Any

import jax
import numpy as np

from fr_jax.distributed._joining import group

__all__ = ["read"]


def read(x: Any) -> Any:
    """The values of small arrays, such as a loss to print; waits for them.

    In a run of several processes an array may lie in one process alone: ``Info.loss`` is where the last stage is. All
    processes must call this, with the same arrays in the same order, and all get the values. In an ordinary process
    it is ``np.asarray`` of each array.

    Args:
      x: an array or a pytree of arrays. Each is whole in some process.

    Returns:
      The same with NumPy arrays.

    Raises:
      ValueError: an array is split over several processes.
      GroupError: another process failed.

    Example:
      >>> import jax.numpy as jnp
      >>> from fr_jax import distributed
      >>> f"loss {distributed.read(jnp.ones(()) / 3):.4f}"
      'loss 0.3333'
    """
    leaves, treedef = jax.tree.flatten(x)
    values: list[Any] = [_value(leaf) for leaf in leaves]
    if group().size > 1:
        packed = [None if value is None else base64.b64encode(value.tobytes()).decode() for value in values]
        found: list[Any] = group().exchange(packed)
        for i, leaf in enumerate(leaves):
            if values[i] is None:
                text = next(of_process[i] for of_process in found if of_process[i] is not None)
                values[i] = np.frombuffer(base64.b64decode(text), leaf.dtype).reshape(leaf.shape)
    return treedef.unflatten(values)


def _value(leaf: Any) -> np.ndarray | None:
    """The value if this process holds it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if not leaf.is_fully_replicated:
        raise ValueError(
            f"read() was given an array {leaf.dtype}{list(leaf.shape)} that is split over several processes; it is for "
            "small values that one process holds as a whole, such as Info.loss or Info.metrics."
        )
    return np.asarray(leaf.addressable_data(0)) if leaf.addressable_shards else None
