"""A Flax Linen module as a stage."""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fr_jax.types import Array, PyTree, Stage, WithLoss

if TYPE_CHECKING:
    from flax import linen as nn

__all__ = ["from_linen", "modes_of"]

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


def modes_of(module: type, train: bool) -> dict[str, bool]:
    """The modes that a module's ``__call__`` names, with their values."""
    parameters = inspect.signature(module.__call__).parameters
    return {name: value for name, value in _modes(train).items() if name in parameters}


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
