"""What features replay and DDG share: gradients that arrive K-k iterations late, and weights predicted for them."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Sharding

from fr_jax._arrays import put
from fr_jax._placement import replicated
from fr_jax.algorithms._losses import loss_of
from fr_jax.algorithms._stages import Stages, zeros
from fr_jax.algorithms._validation import Setup
from fr_jax.algorithms.staleness import predicted, remember_update
from fr_jax.types import Array, Batch, PyTree


def nothing_sent(setup: Setup, stages: Stages, batch: Batch) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """The deltas and the losses of a state before the first step: zeros for each stage k < K."""
    below = range(len(setup.stages) - 1)
    deltas = tuple(zeros(stages.features[k + 1], setup.shardings[k]) for k in below)
    # No leaves unless an optimizer uses the loss, so that checkpoints from before this field existed still fit.
    if not any(setup.takes_loss[:-1]):
        return deltas, tuple(() for _ in below)
    loss = jax.eval_shape(lambda y, z: loss_of(setup.loss_fn, y, z), stages.outputs, batch.targets)
    return deltas, tuple(zeros(loss, replicated(setup.shardings[k])) if _carries_loss(setup, k) else () for k in below)


def send_loss(setup: Setup, loss: Array | tuple, k: int) -> Array | tuple:
    """A loss on the devices of stage k if its optimizer or one below takes it, else ``()``."""
    return put(loss, replicated(setup.shardings[k])) if _carries_loss(setup, k) else ()


def _carries_loss(setup: Setup, k: int) -> bool:
    return any(setup.takes_loss[: k + 1])


def with_prediction(setup: Setup, weight_prediction: float) -> Setup:
    """Optimizers that remember their last update, for all stages but the last; unchanged if prediction is off."""
    if not isinstance(weight_prediction, numbers.Real) or not 0 <= weight_prediction < math.inf:
        raise ValueError(
            f"weight_prediction = {weight_prediction!r} was given; it must be a number, 0 or more. 0 is off, 1 plays "
            "with the weights predicted for the replay, values between them go a part of the way."
        )
    if weight_prediction == 0:
        return setup
    *late, last = setup.optimizers
    return dataclasses.replace(setup, optimizers=(*map(remember_update, late), last))


def make_ahead(shardings: Sequence[Sharding], weight_prediction: float) -> tuple[Callable, ...]:
    """``(params, opt_state) -> w_hat`` for each stage k < K: its weights K-k mini-batches ahead, or as they are."""
    if weight_prediction == 0:
        return tuple(lambda params, opt_state: params for _ in shardings[:-1])

    def ahead(k: int) -> Callable:
        staleness = len(shardings) - 1 - k
        predict = lambda params, opt_state: predicted(params, opt_state, staleness, weight_prediction)
        return jax.jit(predict, out_shardings=replicated(shardings[k]))

    return tuple(ahead(k) for k in range(len(shardings) - 1))
