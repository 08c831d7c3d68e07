"""An Equinox module as a stage."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fr_jax.types import Array, PyTree, Stage

if TYPE_CHECKING:
    import equinox as eqx

__all__ = ["from_equinox"]


def from_equinox(
    module: eqx.Module | Callable[[Array], Any], state: Any = None, *, axis_name: str = "batch", **call_kwargs: object
) -> Stage:
    """Wraps an Equinox module, or a function that makes one, as a stage.

    Equinox modules are called with one example. The stage calls ``jax.vmap(module, axis_name=axis_name)`` with the
    mini-batch, and with a key per example where ``__call__`` has an argument ``key``; in inference it is
    ``eqx.nn.inference_mode`` of the module, which gets no key.

    ``params`` is the module with everything but its floating-point arrays replaced by None, as ``eqx.partition(module,
    eqx.is_inexact_array)`` makes it, so that ``eqx.combine(params, module)`` takes trained weights back. Its other
    arrays, and the arrays of the ``eqx.nn.State``, are the stage's state.

    Args:
      module: a module, whose weights the stage begins with, whatever the key (such as pretrained ones: two stages made
        of the same module begin with the same weights); or a function of a key that makes one, such as ``lambda key:
        eqx.nn.Linear(4, 8, key=key)``, or that makes a module and its state, as ``eqx.nn.make_with_state`` does.
      state: an ``eqx.nn.State``, of a module whose ``__call__`` is ``(x, state, ...) -> (y, state)``.
      axis_name: of the examples, for batch norm.
      **call_kwargs: for the module's ``__call__``.

    Raises:
      ValueError: ``module`` is neither.

    Example:
      >>> import equinox as eqx
      >>> import fr_jax as fr
      >>> layer = fr.from_equinox(lambda key: eqx.nn.Linear(4, 8, key=key))
      >>> params, state = layer.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> layer.apply(params, state, jnp.ones((5, 4)))[0].shape
      (5, 8)
    """
    import equinox as eqx

    given = isinstance(module, eqx.Module)
    if not given and (isinstance(module, type) or not callable(module)):
        raise ValueError(
            f"from_equinox() was given {module!r}; it must be an Equinox module, such as eqx.nn.Linear(4, 8, key=key), "
            "or a function that makes one, such as lambda key: eqx.nn.Linear(4, 8, key=key)."
        )

    def make(key: Array) -> tuple[Any, Any]:
        made: Any = (module, state) if given else module(key)
        return made if isinstance(made, tuple) else (made, state)

    @functools.cache
    def rest() -> Any:
        """Everything but the arrays: made once, and the same for every key."""
        made, _ = (module, state) if given else eqx.filter_eval_shape(make, jax.random.key(0))
        return _parts_of(made)[2]

    def init(key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
        made, kept = make(key)
        params, others, _ = _parts_of(made)
        return params, (others, kept)

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None, train: bool = True
    ) -> tuple[PyTree, PyTree]:
        others, kept = state
        model = eqx.combine(params, others, rest())
        model = model if train else eqx.nn.inference_mode(model)

        def one(x: PyTree, kept: PyTree, key: Array | None) -> tuple[PyTree, PyTree]:
            random = {} if key is None else {"key": key}
            return (
                (model(x, **random, **call_kwargs), None) if kept is None else model(x, kept, **random, **call_kwargs)
            )

        keyed = train and key is not None and _accepts_key(type(model))
        keys = jax.random.split(key, jax.tree.leaves(x)[0].shape[0]) if keyed else None
        axes = (0, None, 0 if keyed else None)
        y, moved = jax.vmap(one, in_axes=axes, out_axes=(0, None), axis_name=axis_name)(x, kept, keys)
        return y, (others, moved) if train else state

    return Stage(init, apply)


def _parts_of(module: Any) -> tuple[Any, Any, Any]:
    """The trained arrays, the other arrays, and the rest; arrays may be their shapes alone."""
    import equinox as eqx

    arrays, rest = eqx.partition(module, lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct))
    params, others = eqx.partition(arrays, lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))
    return params, others, rest


def _accepts_key(module: type) -> bool:
    parameters = inspect.signature(module.__call__).parameters
    return "key" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
