"""Vector-Jacobian products as pytrees: without the weights that their residuals hold, and with them again."""

from __future__ import annotations

import dataclasses

import jax

from fr_jax.types import PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Weight:
    """Stands in a VJP for a leaf of its stage's ``params`` (a pytree without leaves).

    Attributes:
      leaf: which one, in the order of ``jax.tree.leaves(params)``.
    """

    leaf: int


def without_weights(vjp: PyTree, params: PyTree) -> PyTree:
    """The VJP of a jitted function with a :class:`Weight` for every residual that *is* a leaf of ``params``.

    A jitted function returns such a residual as a new array: a copy of the weight.
    """
    place = {id(leaf): Weight(i) for i, leaf in enumerate(jax.tree.leaves(params))}
    return jax.tree.map(lambda residual: place.get(id(residual), residual), vjp)


def with_weights(vjp: PyTree, params: PyTree) -> PyTree:
    """The VJP that :func:`without_weights` took apart, at ``params``."""
    leaves, is_weight = jax.tree.leaves(params), lambda node: isinstance(node, Weight)
    return jax.tree.map(lambda node: leaves[node.leaf] if is_weight(node) else node, vjp, is_leaf=is_weight)
