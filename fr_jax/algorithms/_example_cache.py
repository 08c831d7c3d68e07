"""What a method remembers of every example of the data set, and work for the examples that are due alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from fr_jax._placement import jit, replicated
from fr_jax.algorithms._losses import wide
from fr_jax.algorithms._stages import zeros
from fr_jax.algorithms._validation import batch_size
from fr_jax.types import Array, Batch, PyTree, Stage


def empty(
    cache_size: int | None, features: Sequence[PyTree], shardings: Sequence[Sharding]
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """``(cache, visits)`` before any example was seen, on the stages' devices; ``()`` if nothing is kept.

    ``features`` are the inputs of the stages; those of the first, the data, are not kept.
    """
    N = cache_size
    if not N:
        return ((),) * len(features), ((),) * len(features)
    row = lambda h: jax.ShapeDtypeStruct((N, *h.shape[1:]), wide(h.dtype))
    here = list(map(replicated, shardings))
    kept = [zeros(jax.tree.map(row, h), sharding) for h, sharding in zip(features[1:], here[1:], strict=True)]
    return ((), *kept), tuple(zeros(jax.ShapeDtypeStruct((N,), jnp.int32), sharding) for sharding in here)


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
    recall = jit(recall, donate_argnames="visits" if donate else (), out_shardings=(sharding, sharding, here))
    return recall, jit(store, donate_argnames="cache" if donate else (), out_shardings=here)


def make_gluing(stage: Stage, *, if_due: bool) -> Stage:
    """The stage with an output as wide as gluing variables, whose small moves bfloat16 would round away.

    With ``if_due`` for ``(h, due)``: zeros, not computed, where no example is due.
    """

    def apply(params: PyTree, model_state: PyTree, x: Any, /, **options: Any) -> tuple[PyTree, PyTree]:
        def run(h: PyTree) -> tuple[PyTree, PyTree]:
            h_out, new_state = stage.apply(params, model_state, h, **options)
            return jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), h_out), new_state

        if not if_due:
            return run(x)
        h, due = x
        none = lambda h: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, h))
        return jax.lax.cond(due.any(), run, none, h)

    return Stage(stage.init, apply)


def check_index(cache_size: int | None, batch: Batch) -> None:
    """Raises ValueError where something is kept for every example, and the batch does not say which these are."""
    B, index = batch_size(batch), batch.index
    if cache_size and (index is None or index.shape != (B,) or not jnp.issubdtype(index.dtype, jnp.integer)):
        given = "no index" if index is None else f"an index {index.dtype} of shape {index.shape}"
        raise ValueError(
            f"the batch has {given}, and cache_size = {cache_size} keeps something for every example: pass "
            f"fr_jax.Batch(inputs, targets, index), index ({B},) int32, the examples' places in the data set, from 0."
        )
