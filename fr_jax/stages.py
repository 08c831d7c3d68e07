"""Stages: wrap a Flax module, chain layers into a stage, cut a list of layers into K stages."""

from __future__ import annotations

import functools
import inspect
import operator
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fr_jax.types import Array, PyTree, Stage, WithLoss

if TYPE_CHECKING:
    from flax import linen as nn

__all__ = ["chain", "dies_with_function", "from_linen", "partition", "traced_once"]


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


_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""The names under which modules are told their mode, and the value in training."""


def _modes(train: bool) -> dict[str, bool]:
    return {name: value == train for name, value in _MODES.items()}


def _accepted_modes(module: nn.Module) -> set[str]:
    """The modes that a module's call takes; all of them if it takes any keyword."""
    from flax import linen as nn

    parameters = inspect.signature(type(module).__call__).parameters
    if isinstance(module, nn.Sequential):  # passes keywords to its first member alone
        return set()
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return set(_MODES)
    return set(_MODES) & set(parameters)


def _mode_interceptor(outermost: nn.Module, train: bool, check: bool = True) -> Callable:
    """Brings the mode to where ``outermost`` does not pass it on, and warns of what trains in inference mode.

    That is to the members of an ``nn.Sequential``, which passes no keywords to them; and of the modes that a module
    with ``**kwargs`` passes on, each module inside gets those that it takes.
    """
    from flax import linen as nn

    passes_all = _accepted_modes(outermost) == set(_MODES)

    def in_sequence(module: nn.Module) -> bool:
        while isinstance(module.parent, nn.Sequential):
            module = module.parent
        return module.parent is None or not isinstance(module.parent, nn.Module)

    def intercept(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        accepts = _accepted_modes(module)
        inside = isinstance(module.parent, nn.Module)
        if inside and passes_all:
            takes = lambda name: name in accepts and getattr(module, name, None) is None
            kwargs = {name: value for name, value in kwargs.items() if name not in _MODES or takes(name)}
        if inside and in_sequence(module):
            given = inspect.signature(type(module).__call__).bind_partial(module, *args, **kwargs).arguments
            own = {name for name in accepts if getattr(module, name, None) is None and name not in given}
            kwargs = kwargs | {name: value for name, value in _modes(train).items() if name in own}
        if train and check:
            _warn_of_inference(module, outermost, args, kwargs)
        return call(*args, **kwargs)

    return intercept


def _warn_of_inference(module: nn.Module, outermost: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """A warning if a dropout or batch norm layer is called in inference mode, and not made for it."""
    from flax import linen as nn

    name = "use_running_average" if isinstance(module, nn.BatchNorm) else "deterministic"
    if not isinstance(module, nn.BatchNorm | nn.Dropout) or getattr(module, name) is not None:
        return
    if isinstance(module, nn.Dropout) and module.rate == 0:
        return
    given = inspect.signature(type(module).__call__).bind_partial(module, *args, **kwargs).arguments
    if given.get(name) is True:
        warnings.warn(
            f"{'/'.join(module.path) or type(module).__name__} of {type(outermost).__name__} is called with {name}="
            "True in training, so it does nothing there. from_linen tells a module its mode as one of "
            f"{', '.join(_MODES)}; give the module's __call__ such an argument and pass it on, or a keyword to "
            f"from_linen. If it is meant so, make it with {name}=True.",
            stacklevel=2,
        )


_wrapped: weakref.WeakValueDictionary[tuple, Callable] = weakref.WeakValueDictionary()
"""The ``apply`` of each stage that was made of a Linen module, as long as anything else holds it.

It has its stage as an attribute, because nothing can refer weakly to a tuple.
"""


def _wrap_linen(module: nn.Module, call_kwargs: tuple[tuple[str, object], ...]) -> Stage:
    from flax import linen as nn

    accepts = _accepted_modes(module)

    def flags(train: bool) -> dict[str, Any]:
        return {name: value for name, value in _modes(train).items() if name in accepts} | dict(call_kwargs)

    # Compiled, because Flax's init also runs the forward pass: XLA leaves out what the variables do not need.
    @jax.jit
    def variables(key: Array, x: PyTree) -> Any:
        with nn.intercept_methods(_mode_interceptor(module, False)):
            return module.init({"params": key}, x, **flags(False))

    def value(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    def init(key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
        made = variables(key, jax.tree.map(value, x))
        return made.get("params", {}), {name: made[name] for name in made if name not in ("params", "losses")}

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None, train: bool = True
    ) -> tuple[PyTree, PyTree]:
        variables = {"params": params, **state}
        rngs = None if key is None else {"dropout": key}
        run: Any = functools.partial(module.apply, variables, x, rngs=rngs, **flags(train))
        with nn.intercept_methods(_mode_interceptor(module, train, check=not set(_MODES) & set(dict(call_kwargs)))):
            if not train:
                return run(), state
            y, moved = run(mutable=[*state, "losses"])
        losses = jax.tree.leaves(moved.pop("losses", ()))
        if jax.tree.structure(moved) == jax.tree.structure(state):
            # Flax (0.12) makes float32 statistics, and moves them to float64 if the features are.
            moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)
        return y, WithLoss(moved, sum(map(jnp.sum, losses[1:]), jnp.sum(losses[0]))) if losses else moved

    return Stage(init, apply)


def from_linen(module: nn.Module, **call_kwargs: object) -> Stage:
    """Wraps a Flax Linen module as a stage.

    The collection ``params`` is trained; every other collection (``batch_stats``, ...) but ``losses`` is the stage's
    state, updated in training mode. If ``module.__call__`` has an argument ``train``, ``training``, ``is_training``,
    ``deterministic`` or ``use_running_average``, or ``**kwargs``, it is set from ``train`` of :attr:`Stage.apply`;
    likewise for the members of an ``nn.Sequential``. A dropout or batch norm layer that is then still called in
    inference mode is named in a warning. The stage's key is the module's ``dropout`` stream.

    What the module sows under ``losses`` in training, ``self.sow("losses", "balance", loss)``, is a loss of the stage's
    own (:class:`fr_jax.WithLoss`), the sum of all that is sown; it is not a part of the state.

    The flags go by keyword. A module that must have them by position, such as ``nn.remat(Block, static_argnums=2)``,
    is called so inside a small module of your own.

    ``module.__call__`` takes one array ``(B, ...)``, or one pytree of arrays, and ``call_kwargs``, which win over the
    flags. Equal (hashable) modules give the same stage, which then is traced once.

    Raises:
      ValueError: ``module`` is not a Linen module.

    Example:
      >>> import flax.linen as nn
      >>> import fr_jax as fr
      >>> layer = fr.from_linen(nn.BatchNorm(momentum=0.9))
      >>> params, state = layer.init(jax.random.key(0), jax.numpy.ones((2, 3)))
      >>> sorted(state)
      ['batch_stats']
    """
    from flax import linen as nn

    if not isinstance(module, nn.Module):
        raise ValueError(
            f"from_linen() was given {module!r}; it must be a Flax Linen module, such as flax.linen.Dense(10). "
            "A class must be called first; other functions are wrapped as fr_jax.Stage(init, apply)."
        )
    arguments = (module, tuple(sorted(call_kwargs.items())))
    key = (*arguments, repr(arguments))  # what is written tells apart what is equal and not the same, 2 and 2.0
    try:
        apply: Any = _wrapped.get(key)
    except TypeError:  # not hashable: nn.Sequential([...]), for example, holds a list
        return _wrap_linen(*arguments)
    if apply is not None:
        return apply.stage
    stage = _wrap_linen(*arguments)
    vars(stage.apply)["stage"] = stage
    _wrapped[key] = stage.apply
    return stage


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
