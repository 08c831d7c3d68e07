"""Layers chained into a stage, and a list of layers cut into K stages."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fr_jax.types import Array, PyTree, Stage, WithLoss

__all__ = ["chain", "check_stages", "dies_with_function", "numbered", "partition", "traced_once"]


def dies_with_function(make: Callable[..., Callable]) -> Callable[..., Callable]:
    """Caches ``make(function, *args)``, a jitted function of ``function``, for as long as that is alive.

    ``make`` is given a stand-in that does not keep ``function`` alive: a cache that did would hold for ever what users
    close over, such as a table of embeddings, and what was compiled for it.
    """
    kept: weakref.WeakKeyDictionary[Callable, dict[tuple, Callable]] = weakref.WeakKeyDictionary()

    def cached(function: Callable, *args: Any) -> Callable:
        try:
            of_function = kept.setdefault(function, {})
        except TypeError:  # it cannot be a key
            return make(function, *args)
        if args not in of_function:
            of_function[args] = make(_without_holding(function), *args)
        return of_function[args]

    return cached


def _without_holding(function: Callable) -> Callable:
    reference: Any = weakref.ref(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        return reference()(*args, **kwargs)

    call.__name__ = getattr(function, "__name__", call.__name__)  # in a profile
    return call


def chain(*stages: Stage) -> Stage:
    """Composes one or more stages: ``chain(a, b).apply`` runs ``a``, then ``b``.

    Layer j is initialised and applied with ``fold_in(key, j)``. A chain inside a chain is one layer, which counts its
    own layers from 0: nested chains draw other weights and dropout masks than one flat chain. Layers that are the same
    object are traced once for each input shape, so a network of many equal blocks traces in the time of one.

    Returns:
      A stage whose ``params`` and ``state`` are tuples with one entry per layer; its ``layers`` are the given stages.
      Losses of the layers' own (:class:`fr_jax.WithLoss`) are added up.

    Raises:
      ValueError: no stage was given, or something that is not a Stage.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import fr_jax as fr
      >>> net = fr.chain(fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(2)))
      >>> params, state = net.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> net.apply(params, state, jnp.ones((5, 4)))[0].shape
      (5, 2)
    """
    if not stages:
        raise ValueError("chain() was given no stage; a stage needs at least one layer. Pass one or more stages.")
    check_stages(stages, "layer")
    layers = tuple(_numbered(layer, j) for j, layer in enumerate(stages))
    return Stage(functools.partial(_init_chain, stages), functools.partial(_apply_layers, layers), stages)


def check_stages(stages: Sequence[Any], name: str) -> None:
    """Raises ValueError with the first entry that is not a Stage, and how to make one."""
    for k, stage in enumerate(stages, start=1):
        if not isinstance(stage, Stage):
            raise ValueError(
                f"{name} {k} is {stage!r}; each must be an fr_jax.Stage(init, apply). "
                "Wrap a Flax module with fr_jax.from_linen, a list of layers with fr_jax.chain(*layers)."
            )


def _init_chain(layers: tuple[Stage, ...], key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
    params, state = [], []
    for j, layer in enumerate(layers):
        layer_params, layer_state = layer.init(jax.random.fold_in(key, j), x)
        # Layers that look at their input only for its shape leave this dead code to the compiler.
        x, _ = traced_once(layer.apply)(layer_params, layer_state, x, key=key, train=True)
        params.append(layer_params)
        state.append(layer_state)
    return tuple(params), tuple(state)


def _apply_layers(
    layers: tuple[Stage, ...], params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None, train: bool = True
) -> tuple[PyTree, PyTree]:
    """One numbered layer after the other."""
    new_state, losses = [], []
    for j, layer in enumerate(layers):
        x, layer_state = layer.apply(params[j], state[j], x, key=key, train=train)
        if isinstance(layer_state, WithLoss):
            layer_state, loss = layer_state
            losses.append(loss)
        new_state.append(layer_state)
    return x, WithLoss(tuple(new_state), sum(losses[1:], losses[0])) if losses else tuple(new_state)


def _numbered(layer: Stage, number: int) -> Stage:
    """The layer, applied with ``fold_in(key, number)``."""

    def apply(params: PyTree, state: PyTree, x: PyTree, /, *, key: Array | None = None, train: bool = True) -> Any:
        key = None if key is None else jax.random.fold_in(key, number)
        return traced_once(layer.apply)(params, state, x, key=key, train=train)

    return layer._replace(apply=apply)


def numbered(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages of one network, in which layer i, counted over all of them, is applied with ``fold_in(key, i)``.

    The same key then gives the same dropout masks for every choice of cuts. A stage that is not a chain is a layer.
    """
    counted, first = [], 0
    for stage in stages:
        layers = tuple(_numbered(layer, i) for i, layer in enumerate(stage.layers, start=first))
        apply = functools.partial(_apply_layers, layers)
        counted.append(Stage(stage.init, apply, layers) if layers else _numbered(stage, first))
        first += len(layers) or 1
    return tuple(counted)


@dies_with_function
def traced_once(apply: Callable) -> Callable:
    """``jit`` of a stage's ``apply``, so that equal layers share one trace; inside a jit XLA inlines the call.

    ``key`` and ``train`` go by keyword.
    """
    return jax.jit(apply, static_argnames="train")


def partition(layers: Sequence[Stage], cuts: Sequence[int]) -> tuple[Stage, ...]:
    """Cuts a list of layers into ``len(cuts) + 1`` stages.

    Args:
      layers: the network, one stage per layer, first to last.
      cuts: increasing positions in ``1 .. len(layers) - 1``; stage k is ``layers[cuts[k-1]:cuts[k]]``. Empty for K = 1.

    Returns:
      K stages, each a chain of its layers. In a method (:func:`fr_jax.features_replay`, ...) initial weights and
      dropout masks depend on the layer's place in the network, not on the cuts.

    Raises:
      ValueError: a stage would have no layers, or a cut lies outside the list.

    Example:
      >>> import flax.linen as nn
      >>> import fr_jax as fr
      >>> layers = [fr.from_linen(nn.Dense(width)) for width in (32, 16, 10)]
      >>> [len(stage.layers) for stage in fr.partition(layers, (2,))]
      [2, 1]
    """
    try:
        cuts = tuple(operator.index(cut) for cut in cuts)
    except TypeError:
        raise ValueError(f"cuts {cuts!r} must be whole numbers, such as (3, 5), the places between layers.") from None
    if not layers:
        raise ValueError("partition() was given no layers; a network has at least one.")
    if len(cuts) + 1 > len(layers):
        asked = f"K = {len(cuts) + 1} stages were asked of a network of {len(layers)} layers"
        raise ValueError(f"{asked}; K can be 1 to {len(layers)}. Use a smaller K or a deeper network.")
    bounds = (0, *cuts, len(layers))
    for k, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False), start=1):
        if start >= stop:
            raise ValueError(
                f"cuts {cuts} leave stage {k} of {len(cuts) + 1} without layers; cuts must increase strictly within "
                f"1 .. {len(layers) - 1}. Change the cuts, or let fr_jax.balance choose them."
            )
    return tuple(chain(*layers[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False))
