"""A Flax NNX module as a stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fr_jax.stages.linen import modes_of
from fr_jax.types import Array, PyTree, Stage

if TYPE_CHECKING:
    from flax import nnx

__all__ = ["from_nnx"]


def from_nnx(module: nnx.Module | Callable[[nnx.Rngs], nnx.Module], **call_kwargs: object) -> Stage:
    """Wraps a Flax NNX module, or a function that makes one, as a stage.

    The variables of type ``nnx.Param`` are trained. All others (``nnx.BatchStat``, ...) are the stage's state, updated
    in training mode, but for random numbers and ``nnx.Intermediate``, which is dropped. ``params`` and ``state`` are
    nested dictionaries of arrays as ``nnx.to_pure_dict`` makes them, so that ``nnx.replace_by_pure_dict`` takes
    trained weights back into a module.

    The module is called in its mode by ``module.train()`` and ``module.eval()``; a ``__call__`` with an argument
    ``train``, ``training``, ``is_training``, ``deterministic`` or ``use_running_average`` is told it too. Its random
    streams, in the order of their paths, begin at ``fold_in(key, 0)``, ``fold_in(key, 1)``, ... of the stage's key.

    Args:
      module: a module, whose weights the stage begins with, whatever the key (such as pretrained ones: two stages made
        of the same module begin with the same weights); or a function of ``nnx.Rngs`` that makes one, whose weights
        then are drawn from the key.
      **call_kwargs: for the module's ``__call__``; they win over the mode.

    Raises:
      ValueError: ``module`` is neither.

    Example:
      >>> from flax import nnx
      >>> import fr_jax as fr
      >>> layer = fr.from_nnx(lambda rngs: nnx.BatchNorm(3, rngs=rngs))
      >>> params, state = layer.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> sorted(params), sorted(state)
      (['bias', 'scale'], ['mean', 'var'])
    """
    from flax import nnx, traverse_util

    given = isinstance(module, nnx.Module)
    if not given and (isinstance(module, type) or not callable(module)):
        raise ValueError(
            f"from_nnx() was given {module!r}; it must be an NNX module, such as nnx.Linear(4, 8, rngs=nnx.Rngs(0)), "
            "or a function that makes one, such as lambda rngs: nnx.Linear(4, 8, rngs=rngs)."
        )
    make: Any = (lambda rngs: module) if given else module
    kinds = (nnx.Param, nnx.RngState, nnx.Intermediate, ...)

    @functools.cache
    def parts() -> Any:
        """The graph, and the variables of each kind: shapes alone matter."""
        return nnx.split(module if given else nnx.eval_shape(lambda: make(nnx.Rngs(0))), *kinds)

    def init(key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
        _, params, _, _, state = nnx.split(make(nnx.Rngs(key)), *kinds)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def filled(variables: Any, values: PyTree) -> Any:
        flat = traverse_util.flatten_dict(values)
        return nnx.from_flat_state((path, one.replace(flat[path])) for path, one in nnx.to_flat_state(variables))

    def apply(
        params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None, train: bool = True
    ) -> tuple[PyTree, PyTree]:
        graph, weights, streams, sown, others = parts()
        model = nnx.merge(graph, filled(weights, params), _seeded(streams, key), sown, filled(others, state))
        model.train() if train else model.eval()
        y = model(x, **modes_of(type(model), train) | call_kwargs)
        if not train:
            return y, state
        _, _, _, _, others = nnx.split(model, *kinds)
        moved = nnx.to_pure_dict(others)
        if jax.tree.structure(moved) == jax.tree.structure(state):
            # Flax makes float32 statistics, and moves them to float64 if the features are.
            moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)
        return y, moved

    return Stage(init, apply)


def _seeded(streams: Any, key: Array | None) -> Any:
    """The state of the random streams at their beginning; without a key, which inference does not need, any."""
    from flax import nnx

    key, flat, number = jax.random.key(0) if key is None else key, [], 0
    for path, one in nnx.to_flat_state(streams):
        if isinstance(one, nnx.RngKey):
            own = jax.random.fold_in(key, number)
            number += 1
            value = jax.random.split(own, one.shape) if one.shape else own
        else:
            value = jnp.zeros(one.shape, one.dtype)
        flat.append((path, one.replace(value)))
    return nnx.from_flat_state(flat)
