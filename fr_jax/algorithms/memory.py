"""What a method remembers of every example of the data set, and work for the examples that are due alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from fr_jax.placement import replicated
from fr_jax.types import Array, PyTree


def where_example(chosen: Array, a: PyTree, b: PyTree) -> PyTree:
    """The rows of ``a`` for the chosen examples, the rows of ``b`` for the others."""
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *(1,) * (a.ndim - 1)), a, b), a, b)


def move_due(due: Array, move: Callable, h: PyTree, *, skip: bool) -> PyTree:
    """``move(h)`` for the examples that are due; with ``skip``, nothing is computed where none is."""
    some = lambda h: where_example(due, move(h), h)
    skipping = lambda h: jax.lax.cond(due.any(), some, lambda h: h, h)
    if skip and "conv_general_dilated" in str(jax.make_jaxpr(move)(h)):
        # A CPU computes the gradient of a convolution 20 times slower inside a conditional (jax issue 12868).
        return jax.lax.platform_dependent(h, cpu=some, default=skipping)
    return skipping(h) if skip else some(h)


def make_memory(every: int, sharding: Sharding | None, *, donate: bool) -> tuple[Callable, Callable]:
    """``recall``, ``(visits, cache, index, h) -> (h, due, visits)``, and ``store``, ``(cache, index, h) -> cache``."""
    # An example is due on its visits 0, every, 2 every, ... One outside the cache is always new, and never stored.
    safe = {"mode": "drop", "wrap_negative_indices": False}

    def recall(visits: Array, cache: PyTree, index: Array, h: PyTree) -> tuple[PyTree, Array, Array]:
        seen, kept = jax.tree.map(lambda rows: rows.at[index].get(fill_value=0, **safe), (visits, cache))
        return where_example(seen > 0, kept, h), seen % every == 0, visits.at[index].add(1, **safe)

    def store(cache: PyTree, index: Array, h: PyTree) -> PyTree:
        return jax.tree.map(lambda rows, new: rows.at[index].set(new, **safe), cache, h)

    here = replicated(sharding)
    recall = jax.jit(recall, donate_argnames="visits" if donate else (), out_shardings=(sharding, sharding, here))
    return recall, jax.jit(store, donate_argnames="cache" if donate else (), out_shardings=here)
