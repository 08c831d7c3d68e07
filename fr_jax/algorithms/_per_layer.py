"""Optimizers that do not depend on the cuts: one for each layer of the network, and keys of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fr_jax.stages import check_stages
from fr_jax.types import PyTree, Stage

__all__ = ["PerLayerState", "per_layer", "with_own_keys"]


class PerLayerState(NamedTuple):
    """State of a stage's optimizer from :func:`per_layer`.

    Attributes:
      layers: those of the layers' own optimizers, one entry per layer of the stage.
    """

    layers: tuple[PyTree, ...]


def per_layer(
    make: Callable[[int], optax.GradientTransformation], stages: Sequence[Stage]
) -> tuple[optax.GradientTransformation, ...]:
    """One optimizer for each layer of the network: rates, masks, frozen layers and labels that no cut changes.

    What a method is given as ``optimizer`` sees the weights of a stage, so that paths begin anew in each stage, and a
    mask of the whole network fits none. ``make(i)`` makes the optimizer of layer i = 0..L-1, counted over the network,
    which sees the weights of that layer alone. Then the optimizer's steps are the same for every K. Norms are those of
    the layer: clip with ``global_clip`` of the method. A pytree for the whole network, one entry per layer as
    :func:`fr_jax.layer_params` gives them, goes in by ``labels[i]``.

    Args:
      make: ``i -> optax transformation``.
      stages: the K stages that the method is given.

    Returns:
      K transformations, for a method's ``optimizer``. Their states are :class:`PerLayerState`.

    Raises:
      ValueError: something is not a Stage, or ``make`` returns something else than an optax transformation.

    Example:
      The first layer is frozen, and biases do not decay:

      >>> import jax, jax.numpy as jnp, optax, fr_jax as fr
      >>> stages = fr.partition(fr.models.mlp(depth=3, width=8), (1,))
      >>> matrices = lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
      >>> adamw = optax.adamw(1e-3, mask=matrices)
      >>> optimizer = fr.per_layer(lambda i: optax.set_to_zero() if i == 0 else adamw, stages)
      >>> fit = fr.features_replay(stages, lambda y, z: jnp.mean((y - z) ** 2), optimizer)
      >>> state = fit.init(jax.random.key(0), fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 10))))
      >>> [len(opt_state.layers) for opt_state in state.opt_state]
      [1, 2]
    """
    check_stages(stages, "stage")
    optimizers, first = [], 0
    for stage in stages:
        own = tuple(map(make, range(first, first + (len(stage.layers) or 1))))
        for i, one in enumerate(own, start=first):
            if not isinstance(one, optax.GradientTransformation):
                raise ValueError(
                    f"per_layer() was given {one!r} for layer {i}; make(i) must return an optax transformation, such "
                    "as optax.sgd(0.1), or optax.set_to_zero() for a frozen layer."
                )
        optimizers.append(_of_layers(own, is_chain=bool(stage.layers)))
        first += len(own)
    return tuple(optimizers)


def _of_layers(own: Sequence[optax.GradientTransformation], *, is_chain: bool) -> optax.GradientTransformation:
    """The optimizers of a stage's layers as one."""
    by_layer = lambda tree: tree if is_chain else (tree,)
    inner = tuple(map(optax.with_extra_args_support, own))

    def init(params: PyTree) -> Any:
        return PerLayerState(tuple(one.init(p) for one, p in zip(inner, by_layer(params), strict=True)))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> Any:
        given: Any = by_layer(updates), state.layers, (None,) * len(inner) if params is None else by_layer(params)
        stepped = [one.update(*layer, **extra) for one, *layer in zip(inner, *given, strict=True)]
        updates, layers = zip(*stepped, strict=True)
        return updates if is_chain else updates[0], PerLayerState(layers)

    takes_extra = any(isinstance(one, optax.GradientTransformationExtraArgs) for one in own)
    return (optax.GradientTransformationExtraArgs if takes_extra else optax.GradientTransformation)(init, update)


def with_own_keys(opt_state: PyTree, first: int) -> PyTree:
    """Random keys in the state of an optimizer folded by its number: the first layer of its stage, or its own layer's.

    Otherwise equal optimizers would draw the same noise. That of the network's first layer keeps its key.
    """

    def fold(node: PyTree) -> PyTree:
        if isinstance(node, PerLayerState):
            return PerLayerState(tuple(with_own_keys(layer, first + j) for j, layer in enumerate(node.layers)))
        if first == 0 or not jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            return node
        return jax.jit(functools.partial(_folded, number=first), out_shardings=node.sharding)(node)

    return jax.tree.map(fold, opt_state, is_leaf=lambda node: isinstance(node, PerLayerState))


def _folded(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.reshape(-1)).reshape(keys.shape)
