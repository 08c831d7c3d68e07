"""A state taken apart into the layers of its network, for export and for stages that are cut elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from fr_jax._arrays import place
from fr_jax._placement import default_sharding
from fr_jax.algorithms._per_layer import PerLayerState
from fr_jax.algorithms._validation import check_alive
from fr_jax.types import PyTree, State

__all__ = ["DifferentStatesError", "carry_over", "layer_params"]


class DifferentStatesError(ValueError):
    """Two states are of different networks or optimizers, so that nothing can be carried over."""


def layer_params(state: State) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """Weights and model states of a network, layer by layer, on one device.

    For export, or to start another method, another K or other cuts from: ``init(key, batch, *layer_params(state))``.

    Args:
      state: a state of any method.

    Returns:
      ``(params, model_state)``, tuples with one entry per layer of the network, first to last, on JAX's default device.

    Raises:
      ValueError: the state lies on devices of other processes too.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> layers = fr.models.mlp(depth=3, width=8)
      >>> loss_fn = lambda y, z: jnp.mean((y - z) ** 2)
      >>> make = lambda cuts: fr.features_replay(fr.partition(layers, cuts), loss_fn, optax.sgd(0.1))
      >>> batch = fr.Batch(jnp.ones((4, 5)), jnp.zeros((4, 10)))
      >>> state = make((1, 2)).init(jax.random.key(0), batch)
      >>> params, model_state = fr.layer_params(state)
      >>> len(params), len(make((2,)).init(jax.random.key(0), batch, params, model_state).params)
      (3, 2)
    """
    here = default_sharding()
    params, model_state = _by_layer(state, state.params), _by_layer(state, state.model_state)
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves((params, model_state))):
        raise ValueError(
            "layer_params() was given a state on devices of several processes. Save a checkpoint and restore it in one "
            "process."
        )
    check_alive("layer_params()", params=params, model_state=model_state)
    return jax.device_put((params, model_state), here)


def carry_over(source: Any, fresh: Any) -> Any:
    """``fresh`` with the weights, model states and optimizer states of ``source``, layer by layer.

    What is in flight stays that of ``fresh``: empty. Layers may be cut and placed otherwise in the two states; what an
    optimizer keeps once per stage, such as a count of updates, comes from the stage in which the layers start.

    Args:
      source: a state of any method, on devices of this process; in a group every process has the same.
      fresh: a state of any method for the same layers and kinds of optimizers, of ``init``; on any devices.

    Returns:
      A state like ``fresh``.

    Raises:
      DifferentStatesError: the two networks or their optimizers differ; a ValueError.
    """
    moved = {}
    for name in ("params", "model_state", "opt_state"):
        parts = _split_optimizers(source) if name == "opt_state" else _by_layer(source, getattr(source, name))
        like = _split_optimizers(fresh) if name == "opt_state" else _by_layer(fresh, getattr(fresh, name))
        if _shapes(parts) != _shapes(like):
            raise DifferentStatesError(
                f"the {name} of the two states differ, layer by layer; both must have the same layers and the same "
                "kind of optimizer."
            )
        join = _join_optimizers if name == "opt_state" else _by_stage
        joined = join(fresh, parts)
        moved[name] = jax.tree.map(lambda x, to: place(x, to.sharding), joined, getattr(fresh, name))
    return fresh._replace(**moved)


def _shapes(trees: Any) -> Any:
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), trees)
    return jax.tree.structure(trees), jax.tree.leaves(shapes)


def _by_layer(state: Any, stages: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    counts = state.batch_spec.layers
    return tuple(layer for stage, n in zip(stages, counts, strict=True) for layer in (stage if n else (stage,)))


def _by_stage(state: Any, layers: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    stages, first = [], 0
    for n in state.batch_spec.layers:
        stages.append(tuple(layers[first : first + n]) if n else layers[first])
        first += n or 1
    return tuple(stages)


def _like_params(node: PyTree, params: PyTree) -> bool:
    """Whether a node of an optimizer's state has one entry for each of the weights: momentum, for example.

    optax masks what another optimizer of a partition is in charge of; such a node has no entries there.
    """
    if isinstance(node, optax.MaskedNode):
        return True
    if isinstance(params, dict):
        same = isinstance(node, dict) and node.keys() == params.keys()
        return same and all(_like_params(node[name], params[name]) for name in params)
    if isinstance(params, tuple | list):
        same = type(node) is type(params) and len(node) == len(params)
        return same and all(map(_like_params, node, params))
    return not isinstance(node, dict | tuple | list)


def _split_optimizers(state: Any) -> tuple[PyTree, ...]:
    """The optimizer states, one per layer: a stage's, with the layer's entry of whatever is like the weights."""
    layers = []
    for params, opt_state, n in zip(state.params, state.opt_state, state.batch_spec.layers, strict=True):
        of_layers = lambda node, params=params: isinstance(node, PerLayerState) or _like_params(node, params)

        def pick(node: PyTree, j: int, n: int = n, of_layers: Callable = of_layers) -> PyTree:
            if isinstance(node, PerLayerState):
                return PerLayerState(node.layers[j : j + 1])
            return node[j] if n and of_layers(node) else node

        layers += [jax.tree.map(functools.partial(pick, j=j), opt_state, is_leaf=of_layers) for j in range(n or 1)]
    return tuple(layers)


def _join_optimizers(state: Any, layers: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    stages, first = [], 0
    for params, opt_state, n in zip(state.params, state.opt_state, state.batch_spec.layers, strict=True):
        own = layers[first : first + (n or 1)]
        of_layers = lambda node, params=params: isinstance(node, PerLayerState) or _like_params(node, params)

        def join(node: PyTree, *parts: PyTree, n: int = n, of_layers: Callable = of_layers) -> PyTree:
            if isinstance(node, PerLayerState):
                return PerLayerState(tuple(layer for part in parts for layer in part.layers))
            return parts if n and of_layers(node) else parts[0]

        outer = jax.tree.structure(opt_state, is_leaf=of_layers)
        nodes = [outer.flatten_up_to(layer) for layer in (opt_state, *own)]
        stages.append(outer.unflatten(map(join, *nodes)))
        first += n or 1
    return tuple(stages)
