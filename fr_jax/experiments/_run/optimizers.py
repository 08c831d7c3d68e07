"""Optimizer and learning rate of the training programs, from their settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import optax

from fr_jax.algorithms import staleness
from fr_jax.experiments._cli.settings import Resolved, own_of_method
from fr_jax.experiments._methods import METHODS

__all__ = ["learning_rate_schedule", "make_optimizer", "make_optimizers"]


def learning_rate_schedule(settings: Resolved, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by number of updates; with ``accumulate`` there is one for every m mini-batches.

    ``steps`` divides the initial rate by 10 after each milestone (epochs); ``cosine`` lets it fall from the end of the
    warm-up to 0 at the end of the run. During the warm-up the rate is (t + 1) / W of that in update t = 0, 1, ...
    """
    s, per_update = settings, own_of_method(settings, settings.method).get("accumulate", 1)
    warmup = math.ceil(s.warmup / per_update)
    if s.schedule == "constant":
        rate = optax.constant_schedule(s.learning_rate)
    elif s.schedule == "cosine":
        falling = optax.cosine_decay_schedule(s.learning_rate, max(1, s.steps // per_update - warmup))
        rate = lambda count: falling(jnp.maximum(count - warmup, 0))
    else:
        # The hundredth of a step keeps 0.7 x 10 = 7.000000000000001 from becoming 8.
        boundaries = [math.ceil(epoch * steps_per_epoch / per_update - 0.01) for epoch in s.milestones]
        scales = {boundary: 0.1 ** boundaries.count(boundary) for boundary in boundaries}
        rate = optax.piecewise_constant_schedule(s.learning_rate, scales)
    return (lambda count: rate(count) * jnp.minimum(1.0, (count + 1) / warmup)) if warmup else rate


def make_optimizers(
    settings: Resolved, steps_per_epoch: int
) -> optax.GradientTransformation | tuple[optax.GradientTransformation, ...]:
    """One for all stages, or one each if they have learning rates of their own or make up for their delays."""
    s, card = settings, METHODS[settings.method]
    delays = card.late and (s.optimizer == "nadam" or own_of_method(s, s.method)["spike_compensation"])
    if s.stage_learning_rates is None and not delays:
        return make_optimizer(s, steps_per_epoch)
    rates = s.stage_learning_rates or (s.learning_rate,) * s.K
    each = (dataclasses.replace(s, learning_rate=rate) for rate in rates)
    return tuple(make_optimizer(one, steps_per_epoch, k) for k, one in enumerate(each))


def make_optimizer(settings: Resolved, steps_per_epoch: int, k: int = -1) -> optax.GradientTransformation:
    """The optimizer of stage k = 0..K-1, the last by default; each has a state, and clips by its own gradient's norm.

    ``sgd`` adds the weight decay to the gradient, as in the papers' PyTorch code; the others decouple it. ``muon``
    orthogonalizes the updates of weight matrices, the output layer's included; Adam trains the rest, with the same
    learning rate and no weight decay (:func:`fr_jax.staleness.muon`). ``nadam`` and ``spike_compensation`` know how
    late the stage is.
    """
    s, rate = settings, learning_rate_schedule(settings, steps_per_epoch)
    own = own_of_method(s, s.method)
    if s.optimizer == "adamw":
        optimizer = optax.adamw(rate, weight_decay=s.weight_decay)
    elif s.optimizer == "muon":
        (optimizer,) = staleness.muon(rate, 1, weight_decay=s.weight_decay, output_layer_by_adam=False)
    elif s.optimizer == "nadam":
        options = {"late_b1": own.get("late_b1", 0.9), "weight_decay": s.weight_decay}
        recipe = lambda K, M: staleness.nadam(rate, K, M, **options)
        optimizer = _of_stage(s, k, recipe)
    else:
        if own.get("spike_compensation"):
            optimizer = _of_stage(s, k, lambda K, M: staleness.spike_compensation(rate, s.momentum, K, M))
        else:
            optimizer = optax.sgd(rate, momentum=s.momentum or None, nesterov=s.nesterov)
        if s.weight_decay:
            optimizer = optax.chain(optax.add_decayed_weights(s.weight_decay), optimizer)
    return optimizer if s.clip is None else optax.chain(optax.clip_by_global_norm(s.clip), optimizer)


def _of_stage(
    settings: Resolved, k: int, recipe: Callable[[int, int], Sequence[optax.GradientTransformation]]
) -> optax.GradientTransformation:
    """Stage k's of ``recipe(K, M)``, with M micro-batches for one update; that of K = 1 if no gradient is late."""
    own = own_of_method(settings, settings.method)
    M = own.get("microbatches", 1) * own.get("accumulate", 1)
    return recipe(settings.K, M)[k] if METHODS[settings.method].late else recipe(1, M)[0]
