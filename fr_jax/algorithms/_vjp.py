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


def needed(vjp: PyTree, params: PyTree) -> tuple:
    """The leaves of ``params`` that such a VJP needs, in their order, with None for the others; for with_weights."""
    used = {node.leaf for node in jax.tree.leaves(vjp, is_leaf=_is_weight) if _is_weight(node)}
    return tuple(leaf if i in used else None for i, leaf in enumerate(_leaves(params)))


def with_weights(vjp: PyTree, params: PyTree) -> PyTree:
    """The VJP that :func:`without_weights` took apart, at ``params``, or at what is :func:`needed` of them."""
    leaves = _leaves(params)
    return jax.tree.map(lambda node: leaves[node.leaf] if _is_weight(node) else node, vjp, is_leaf=_is_weight)


def _is_weight(node: PyTree) -> bool:
    return isinstance(node, Weight)


def _leaves(params: PyTree) -> list:
    return jax.tree.leaves(params, is_leaf=lambda node: node is None)
