"""What a method reports of a step: the loss and the metrics of the user's functions, checked, and gradient norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fr_jax.types import Array, LossFn, MetricsFn, PyTree

__all__ = ["gradient_norm", "loss_of", "metrics_of", "wide"]


def loss_of(loss_fn: LossFn, outputs: PyTree, targets: PyTree) -> Array:
    """``loss_fn(outputs, targets)``; raises ValueError if that is not one real number. For use under ``jit``."""
    loss = loss_fn(outputs, targets)
    # JAX would say so too, about a function of this library and not about the user's.
    if not isinstance(loss, jax.Array) or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        given = f"{loss.dtype} of shape {loss.shape}" if isinstance(loss, jax.Array) else f"a {type(loss).__name__}"
        raise ValueError(
            f"loss_fn returned {given}; it must be one floating-point number, the mean over the mini-batch. "
            "Take the mean of losses by example; give what is to be reported beside it as metrics_fn."
        )
    return loss


def metrics_of(metrics_fn: MetricsFn | None, outputs: PyTree, targets: PyTree) -> dict[str, Array]:
    """``metrics_fn(outputs, targets)``; raises ValueError if that is not a dict or takes a method's own names."""
    if metrics_fn is None:
        return {}
    metrics = metrics_fn(outputs, targets)
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"metrics_fn returned a {type(metrics).__name__}; it must be a dict of names and arrays, such as "
            '{"accuracy": accuracy}.'
        )
    taken = [name for name in metrics if name == "loss" or str(name).startswith("gradient_norm/")]
    if taken:
        raise ValueError(
            f"metrics_fn returned {', '.join(map(repr, taken))}; the loss and gradient_norm/k are the method's own, "
            "by which a run that diverges is found. Choose other names."
        )
    return dict(metrics)


def wide(dtype: Any) -> Any:
    """The type to add up in: float32 at least, also under ``jax_numpy_dtype_promotion="strict"``."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def gradient_norm(grads: PyTree) -> Array:
    """The Euclidean norm over all leaves, in float32 at least: squares of float16 overflow at a norm of 256."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(wide(g.dtype)), grads))
