"""Vector-Jacobian products as pytrees: without the weights that their residuals hold, and with them again.

What a jitted function returns is a new array: a VJP would hold a copy of each weight that it needs, and of each that
was cast or reshaped for a product. So a residual that follows from weights alone is left out of what a forward pass
returns, and made again where the VJP is applied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun, no_effects

from fr_jax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """What a traced forward pass makes of weights alone; its first inputs are the leaves of ``params``.

    Equal to itself alone.
    """

    closed: ClosedJaxpr


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FromWeights:
    """Stands in a VJP for a residual that follows from the weights of its stage (a pytree without leaves).

    Attributes:
      output: which output of the forward pass it is.
      leaves: the leaves of ``params`` that it follows from, in the order of ``jax.tree.leaves``.
      traced: the forward pass.
    """

    output: int
    leaves: frozenset[int]
    traced: Traced


def without_weights(forward: Callable, params: PyTree, *others: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """``forward(params, *others) -> (h_out, vjp, state)``, with a :class:`FromWeights` for each such residual."""
    leaves, treedef = jax.tree.flatten((params, *others))
    kinds = [jax.random.key_impl(leaf) if _is_key(leaf) else None for leaf in leaves]
    leaves = [leaf if kind is None else jax.random.key_data(leaf) for leaf, kind in zip(leaves, kinds, strict=True)]

    def flat(*leaves: Any) -> tuple[PyTree, PyTree, PyTree]:
        wrap = lambda leaf, kind: leaf if kind is None else jax.random.wrap_key_data(leaf, impl=kind)
        return forward(*treedef.unflatten(map(wrap, leaves, kinds)))

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    weights = len(jax.tree.leaves(params))
    inputs: list[frozenset[int] | None] = [frozenset([i]) if i < weights else None for i in range(len(leaves))]
    first = len(jax.tree.leaves(shapes[0]))  # of the outputs that are leaves of the VJP
    residuals = range(first, first + len(jax.tree.leaves(shapes[1])))
    origins = _origins(closed.jaxpr, inputs)
    left_out = {i: origin for i in residuals if (origin := origins[i]) is not None}
    traced, outputs = Traced(_only(closed, left_out)), list(jaxpr_as_fun(closed)(*leaves))
    for i, origin in left_out.items():
        outputs[i] = FromWeights(i, origin, traced)
    # Unflattened by parts: what stands for a leaf is not a leaf itself.
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


class Needed(NamedTuple):
    """The leaves of a stage's ``params`` in the order of ``jax.tree.leaves``, with None for those not needed."""

    leaves: tuple[Any, ...]


def needed(vjp: PyTree, params: PyTree) -> Needed:
    """What such a VJP needs of ``params``, for :func:`with_weights`."""
    used = {leaf for node in jax.tree.leaves(vjp, is_leaf=_stands_in) if _stands_in(node) for leaf in node.leaves}
    return Needed(tuple(leaf if i in used else None for i, leaf in enumerate(jax.tree.leaves(params))))


def with_weights(vjp: PyTree, params: PyTree) -> PyTree:
    """The VJP that :func:`without_weights` took apart, at ``params``, or at what is :func:`needed` of them."""
    # None is a leaf in Needed alone: in params it is a part of the structure, which the trace has not counted.
    leaves = params.leaves if isinstance(params, Needed) else jax.tree.leaves(params)
    made: dict[Traced, list[Any]] = {}

    def residual(node: Any) -> Any:
        if not _stands_in(node):
            return node
        if node.traced not in made:
            made[node.traced] = _from_weights(node.traced.closed, leaves)
        return made[node.traced][node.output]

    return jax.tree.map(residual, vjp, is_leaf=_stands_in)


def _stands_in(node: PyTree) -> bool:
    return isinstance(node, FromWeights)


def _called(eqn: Any) -> ClosedJaxpr | None:
    """The function of an equation that calls a jitted one without effects."""
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") and not eqn.effects else None


def _origins(jaxpr: Jaxpr, inputs: Sequence[frozenset[int] | None]) -> list[frozenset[int] | None]:
    """For each output the weights that it follows from, None if from something else too; likewise for the inputs."""
    found = dict(zip(jaxpr.invars, inputs, strict=True)) | dict.fromkeys(jaxpr.constvars, frozenset())
    get = lambda var: frozenset() if isinstance(var, Literal) else found[var]
    for eqn in jaxpr.eqns:
        origins, called = [get(var) for var in eqn.invars], _called(eqn)
        if called is not None:
            results = _origins(called.jaxpr, origins)
        else:
            known = [origin for origin in origins if origin is not None]
            one = frozenset().union(*known) if len(known) == len(origins) and not eqn.effects else None
            results = [one] * len(eqn.outvars)
        found |= dict(zip(eqn.outvars, results, strict=True))
    return [get(var) for var in jaxpr.outvars]


def _only(closed: ClosedJaxpr, wanted: Collection[int]) -> ClosedJaxpr:
    """The same function without what only outputs other than those ``wanted`` need, such as what it prints.

    Another output has the value of one that is wanted, so that their places stay.
    """
    jaxpr, equations = closed.jaxpr, []
    outputs = [jaxpr.outvars[i] for i in wanted]
    read = {var for var in outputs if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if read.intersection(eqn.outvars):
            equations.append(eqn)
            read.update(var for var in eqn.invars if not isinstance(var, Literal))
    places = [var if i in wanted else outputs[0] for i, var in enumerate(jaxpr.outvars)] if outputs else []
    return ClosedJaxpr(jaxpr.replace(eqns=equations[::-1], outvars=places, effects=no_effects), closed.consts)


def _from_weights(closed: ClosedJaxpr, weights: Sequence[Any]) -> list[Any]:
    """The outputs for these first inputs; no result depends on the others, which are zeros."""
    zeros = [jnp.zeros(aval.shape, aval.dtype) for aval in closed.in_avals]
    given = [zero if weight is None else weight for weight, zero in zip(weights, zeros, strict=False)]
    return jaxpr_as_fun(closed)(*given, *zeros[len(given) :])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
