"""Clipping by the norm of the whole network's gradient, of which every stage has a part on its own devices.

With g_k the gradient of stage k, and G the largest norm:

    g_k <- g_k min(1, G / ||g||),  ||g||^2 = sum_j ||g_j||^2

Norms travel as scalars: from all stages to the last, which sends each stage the sum of the others' squares. Where
gradients are on time, all stages have those of the same mini-batch before any of them updates. Where they are late,
nothing waits: a stage has its own gradient, and of the others those of the step before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax._arrays import put
from fr_jax._placement import replicated
from fr_jax.algorithms._losses import gradient_norm
from fr_jax.types import Array, PyTree

__all__ = ["GlobalClipState", "clipped", "others_are_finite", "squares_of_others", "with_others"]


class GlobalClipState(NamedTuple):
    """State of :func:`clipped`.

    Attributes:
      others: scalar, the sum of the squared norms of the other stages' gradients, as far as they are known.
      inner_state: the optimizer's own state.
    """

    others: Array
    inner_state: PyTree


def clipped(optimizer: optax.GradientTransformation, max_norm: float) -> optax.GradientTransformation:
    """The optimizer of one stage, which sees its gradient scaled down with those of the other stages."""
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        return GlobalClipState(jnp.zeros((), jnp.result_type(float)), inner.init(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> Any:
        norm = jnp.sqrt(jnp.square(gradient_norm(updates).astype(state.others.dtype)) + state.others)
        factor = jnp.where(norm <= max_norm, jnp.ones_like(norm), max_norm / norm)  # NaN where the norm is
        updates = jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        return updates, GlobalClipState(state.others, inner_state)

    return type(optimizer)(init, update)  # whether it takes extra arguments, such as value=loss


def squares_of_others(norms: Sequence[Array | None], shardings: Sequence[Sharding], *, late: bool) -> list[Array]:
    """For each stage the sum of the others' squares, on its devices; None counts as 0: it has no gradient yet."""
    here: Any = [replicated(sharding) for sharding in shardings]
    sums = _squares_of_others([put(norm, here[-1]) for norm in norms], late=late)
    return [put(one, sharding) for one, sharding in zip(sums, here, strict=True)]


@functools.partial(jax.jit, static_argnames="late")
def _squares_of_others(norms: list[Array | None], *, late: bool) -> list[Array]:
    def square(norm: Array | None) -> Array:
        value = jnp.asarray(0.0 if norm is None else norm, jnp.result_type(float))
        # A late stage decides by its own gradient whether there is something wrong with it.
        return jnp.square(jnp.where(jnp.isfinite(value), value, 0) if late else value)

    squares = jnp.stack([square(norm) for norm in norms])
    own = jnp.eye(len(norms), dtype=bool)
    return list(jnp.sum(jnp.where(own, 0, squares[None]), axis=1))


def with_others(opt_state: PyTree, others: Array | None) -> PyTree:
    """The state of a stage's optimizer, with what is known now; None: nothing."""

    def know(node: Any) -> Any:
        if not isinstance(node, GlobalClipState):
            return node
        return node._replace(others=jnp.zeros_like(node.others) if others is None else others)

    return jax.tree.map(know, opt_state, is_leaf=lambda node: isinstance(node, GlobalClipState))


def others_are_finite(opt_state: PyTree) -> Array | bool:
    """Whether what such a state knows of the other stages is finite; True for another optimizer's."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, GlobalClipState))
    return next((jnp.isfinite(node.others) for node in nodes if isinstance(node, GlobalClipState)), True)
