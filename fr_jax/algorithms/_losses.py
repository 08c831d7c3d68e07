"""What a method reports of a step: the loss and the metrics of the user's functions, checked, and gradient norms."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fr_jax.algorithms._auxiliary import AUXILIARY, taken_apart
from fr_jax.types import Array, LossFn, MetricsFn, PyTree

__all__ = ["NOTHING", "Scored", "Told", "combine", "gradient_norm", "loss_of", "quotient", "score", "wide"]

Terms: TypeAlias = tuple[Array, "Array | tuple[()]"]
"""``(total, weight)``, whose quotient is reported; ``()`` as weight: the total is the mean itself."""


class Scored(NamedTuple):
    """The terms of the loss, and of each metric, of a mini-batch or a micro-batch."""

    loss: Terms
    metrics: dict[str, Terms]

    def objective(self, *, of_total: bool = False) -> Array:
        """What is trained: the loss and the auxiliary losses, if there are any; or their totals."""
        value = lambda terms: terms[0] if of_total else quotient(*terms)
        own = self.metrics.get(AUXILIARY)
        return value(self.loss) if own is None else value(self.loss) + value(own)


class Told(NamedTuple):
    """What the update of a stage needs of its mini-batch beside gradients; ``()`` where nothing does.

    Attributes:
      loss: for an optimizer that takes ``value=loss``.
      weight: that of a loss ``(total, weight)`` over M > 1 micro-batches, whose gradients are those of the total.
    """

    loss: Array | tuple[()] = ()
    weight: Array | tuple[()] = ()


NOTHING = Told()


def _is_number(x: Any, kind: Any) -> bool:
    return isinstance(x, jax.Array) and not x.shape and jnp.issubdtype(x.dtype, kind)


def _loss_terms(loss_fn: LossFn, outputs: PyTree, targets: PyTree) -> Terms:
    loss = loss_fn(outputs, targets)
    total, weight = loss if isinstance(loss, tuple) and len(loss) == 2 else (loss, ())
    if isinstance(weight, numbers.Real | np.generic):  # such as losses.size
        weight = jnp.asarray(weight)
    # JAX would say so too, about a function of this library and not about the user's.
    if not _is_number(total, jnp.floating) or not (isinstance(weight, tuple) or _is_number(weight, jnp.number)):
        kind = lambda x: f"{x.dtype} of shape {x.shape}" if isinstance(x, jax.Array) else f"a {type(x).__name__}"
        given = f"a tuple of {', '.join(map(kind, loss))}" if isinstance(loss, tuple) else kind(loss)
        raise ValueError(
            f"loss_fn returned {given}; it must be one floating-point number, the mean over the mini-batch, or a pair "
            "(total, weight) of arrays of shape (), whose quotient is the loss. Take the mean of losses by example; "
            "give what is to be reported beside it as metrics_fn."
        )
    if isinstance(weight, tuple):
        return total, ()
    exact = wide(total.dtype)  # bfloat16 has no 257, and float16 no 65,536
    return total.astype(exact), jax.lax.stop_gradient(weight.astype(exact))


def quotient(total: Array, weight: Array | tuple[()]) -> Array:
    """The loss from its terms: the total alone without a weight, or if the weight is 0 (all examples are masked)."""
    return total if isinstance(weight, tuple) else total / jnp.where(weight == 0, jnp.ones_like(weight), weight)


def loss_of(loss_fn: LossFn, outputs: PyTree, targets: PyTree) -> Array:
    """The loss of a mini-batch; raises ValueError if ``loss_fn`` returns something else. For use under ``jit``."""
    return quotient(*_loss_terms(loss_fn, outputs, targets))


def score(loss_fn: LossFn, metrics_fn: MetricsFn | None, outputs: PyTree, targets: PyTree) -> Scored:
    """The terms of ``loss_fn`` and ``metrics_fn``; raises ValueError if they return something else.

    Auxiliary losses beside the outputs have the weight of the loss.
    """
    outputs, losses = taken_apart(outputs)
    pair = lambda value: value if isinstance(value, tuple) and len(value) == 2 else (value, ())
    metrics = {name: pair(value) for name, value in _metrics_of(metrics_fn, outputs, targets).items()}
    total, weight = _loss_terms(loss_fn, outputs, targets)
    if losses is not None:
        mean = jnp.mean(losses)
        metrics[AUXILIARY] = (mean, ()) if isinstance(weight, tuple) else (mean.astype(weight.dtype) * weight, weight)
    return Scored((total, weight), metrics)


def combine(parts: Sequence[Scored]) -> tuple[Array, Array | tuple[()], dict[str, Array]]:
    """Loss, weight and metrics of a mini-batch from the terms of its M micro-batches.

    Totals and weights are added up separately, in float32 at least; without weights it is the mean. What M = 1 part has
    without a weight is reported as it is.
    """

    def mean(terms: Sequence[Terms]) -> tuple[Any, Any]:
        totals, weights = zip(*terms, strict=True)
        if len(terms) == 1 and isinstance(weights[0], tuple):
            return totals[0], ()
        add = lambda *leaves: sum(leaf.astype(wide(leaf.dtype)) for leaf in map(jnp.asarray, leaves))
        weight: Any = () if isinstance(weights[0], tuple) else add(*weights)
        divide = lambda total: total / len(terms) if isinstance(weight, tuple) else quotient(total, weight)
        return jax.tree.map(divide, jax.tree.map(add, *totals)), weight

    loss, weight = mean([part.loss for part in parts])
    metrics = {name: mean([part.metrics[name] for part in parts])[0] for name in parts[0].metrics}
    return loss, weight, metrics


def _metrics_of(metrics_fn: MetricsFn | None, outputs: PyTree, targets: PyTree) -> dict[str, Any]:
    if metrics_fn is None:
        return {}
    metrics = metrics_fn(outputs, targets)
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"metrics_fn returned a {type(metrics).__name__}; it must be a dict of names and arrays, such as "
            '{"accuracy": accuracy}.'
        )
    taken = [name for name in metrics if name in ("loss", AUXILIARY) or str(name).startswith("gradient_norm/")]
    if taken:
        raise ValueError(
            f"metrics_fn returned {', '.join(map(repr, taken))}; the losses and gradient_norm/k are the method's own, "
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
