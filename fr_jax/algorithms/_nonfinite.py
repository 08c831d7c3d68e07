"""Mini-batches with a loss or a gradient that is not finite, of which a stage drops its whole update.

Each stage decides for itself, by the norm of its gradient. Weights and optimizer stay as they are, and the statistics
that the mini-batch has moved go back if nothing else has moved them since: everywhere but in the stages of late
methods, which move them when they play, long before the gradient comes. These keep their old statistics if the new
ones are not finite. A loss that is not finite makes the gradients not finite, and so what is sent down.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fr_jax.types import Array, LossFn, PyTree, Stage

__all__ = ["keeping", "settled", "telling"]


def settled(finite: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new``, or ``old`` if the gradient was not finite."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def keeping(stage: Stage) -> Stage:
    """The stage, whose state stays as it is in training where its new one is not finite."""

    def apply(
        params: PyTree, state: PyTree, x: PyTree, /, *, key: Array | None = None, train: bool = True
    ) -> tuple[PyTree, PyTree]:
        y, moved = stage.apply(params, state, x, key=key, train=train)
        leaves = zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True)
        # What is infinite from the start, such as a mask, says nothing.
        sound = [jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old)) for new, old in leaves if _is_float(new)]
        if not (train and sound):
            return y, moved
        return y, settled(jnp.stack(sound).all(), moved, state)

    return stage._replace(apply=apply)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def telling(loss_fn: LossFn) -> LossFn:
    """The loss, whose gradient is not finite where it is not."""

    def told(outputs: PyTree, targets: PyTree) -> Any:
        loss = loss_fn(outputs, targets)
        total, *weight = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss,)
        if not (isinstance(total, jax.Array) and _is_float(total)):
            return loss  # which is refused
        return (_told(total), *weight) if weight else _told(total)

    return told


@jax.custom_jvp
def _told(total: Array) -> Array:
    return total


@_told.defjvp
def _told_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (total,), (tangent,) = primals, tangents
    return total, tangent * jnp.where(jnp.isfinite(total), 1, jnp.nan).astype(total.dtype)
