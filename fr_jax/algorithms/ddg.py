"""Decoupled parallel back-propagation with delayed gradients (Huo, Gu, Yang, Huang, ICML 2018): DDG keeps old VJPs.

At iteration t, for stages k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x), and s = t+k-K:

    forward   h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to stage k+1; its VJP at w_k^t is kept
    gradient  g_k^t = (dh_k^s / dw_k^s) . delta_k^t,  by the VJP kept at iteration s
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t
    send      delta_{k-1}^{t+1} = (dh_k^s / dh_{k-1}^s) . delta_k^t  to stage k-1

Stage K's delta is the gradient of the loss itself. delta_k^t was sent at t-1 and belongs to mini-batch s too, so g_k^t
is the gradient of back-propagation for mini-batch s at the weights w^s, K-k iterations late. While s < 0, stage k has
nothing to apply and does not update. In code stages count from 0, so the staleness of stage k is K-1-k.

With weight prediction, the forward pass and its VJP use ŵ_k^t instead, a prediction of w_k^{t+K-k}.

With M micro-batches all of this happens for each micro-batch i = t M + m, m = 0..M-1, instead of t, one after another,
except for the update: stage k makes one per mini-batch, with the mean of the M gradients, after the backward pass of
the last one. So a gradient is late by K-k micro-batches, ceil((K-k)/M) updates at most, and nothing waits.

A VJP holds activations only. The weights at which it was taken are kept once for all micro-batches played with them:
weight stashing, as in PipeDream (Narayanan et al. 2019), whose gradients are these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jax.sharding import Sharding

from fr_jax.algorithms import _delayed as delayed
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms._history import History
from fr_jax.algorithms._losses import Told
from fr_jax.algorithms._microbatches import Shared, make_shared
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_last
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.algorithms._vjp import needed
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["DDGState", "ddg"]


class DDGState(NamedTuple):
    """Everything in flight, beside the fields of every state (:class:`fr_jax.types.State`).

    Attributes:
      history: the VJPs of the micro-batches s = i+k-K .. i-1 that stage k has not applied yet: K-k between steps, and
        one more inside a step. Their leaves are the stored activations, without weights.
      deltas: delta_k^i for k < K, as sent by stage k+1 at i-1; zeros before the first arrives.
      losses: of the last whole mini-batch of ``deltas``, what the update of a stage needs (:class:`Told`).
      sums: the gradients that stage k has so far of a mini-batch of which the last (K-k) mod M micro-batches are
        missing, added up; None if none are.
      stash: the weights, older than ``params``, that the VJPs need: K-k versions for M = 1, else at most ceil((K-k)/M).
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    history: tuple[History, ...]
    deltas: tuple[PyTree, ...]
    losses: tuple[Told, ...]
    sums: tuple[PyTree, ...]
    stash: tuple[History, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    remedies: delayed.Remedies,
    setup: Setup,
    parts: DDGParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> DDGState:
    """Weights w^0; deltas are zeros, and the VJPs are those of an input of zeros, which is never applied."""
    stages = init_stages(setup, key, batch, params, model_state)
    history = delayed.vjps_of_zeros(setup, stages, parts.forwards)
    deltas, losses = delayed.nothing_sent(setup, stages)
    stash = [
        remedies.versions(len(vjps.entries), setup.microbatches).nothing_stashed(
            needed(vjps.entries[0], stages.params[k])
        )
        for k, vjps in enumerate(history)
    ]
    return DDGState(
        **stages.fields(),
        history=history,
        deltas=deltas,
        losses=losses,
        sums=delayed.nothing_added(setup, stages),
        stash=tuple(stash),
    )


class DDGParts(NamedTuple):
    """The jitted functions: K-1 of each of three, the last stage's one pass, and the shared ones."""

    ahead: tuple[Callable, ...]
    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    last: Callable
    shared: Shared


def make_parts(remedies: delayed.Remedies, setup: Setup) -> DDGParts:
    """Prediction, forward and backward for each stage k < K, and the last stage.

    The weights are not donated: those of kept VJPs are in the stash.
    """
    stages, shardings, donate = setup.stages, setup.shardings, setup.donate
    below = range(len(stages) - 1)
    return DDGParts(
        ahead=delayed.make_ahead(shardings, remedies),
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0, donate_sums=donate) for k in below),
        last=make_last(setup),
        shared=make_shared(setup, holding=len(below)),
    )


def step(
    remedies: delayed.Remedies, setup: Setup, parts: DDGParts, state: DDGState, batch: Batch
) -> tuple[DDGState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now = Iteration(setup, state, batch, parts.shared, any_size=False)
    K, M = len(setup.stages), setup.microbatches
    history, stash = list(state.history), list(state.stash)
    deltas, losses = list(state.deltas), list(state.losses)
    # The weights with which a stage goes forward until its next update, and those of them that its VJPs need.
    at: list[Any] = [None] * (K - 1)
    kept: list[Any] = [None] * (K - 1)

    for i, h, targets in now.microbatches(batch):
        # Forward; the VJP is kept.
        for k in range(K - 1):
            if at[k] is None:
                at[k] = parts.ahead[k](now.params[k], now.opt_state[k], delayed.horizon(i, K - 1 - k, M))
            h, vjp = now.forward(k, parts.forwards[k], h, at[k])
            kept[k] = needed(vjp, at[k]) if kept[k] is None else kept[k]
            history[k] = fifo.push(history[k], vjp)
            h = now.send(h, k + 1)

        # Stage K: forward and backward in one pass. Nothing here keeps alive what has been used.
        delta, h, targets, vjp = now.train(parts.last, h, targets), None, None, None
        told = now.conclude()

        # The others: gradient by the oldest VJP, update, send. delta_k was sent at i-1; delta is for i+1.
        for k in reversed(range(K - 1)):
            d = K - 1 - k
            vjp, history[k] = fifo.pop(history[k])  # also while there is nothing to apply: that of init goes first
            arrived, arrived_told = delayed.receive(now, k, i - d, delta, told, deltas, losses)
            delta, told = None, arrived_told
            weights, stash[k] = remedies.versions(d, M).turn(stash[k], kept[k], i)
            if i >= d:
                delta = now.pull(k, parts.pulls[k], vjp, arrived, weights)
            vjp = arrived = weights = None
            if delayed.is_whole(i - d, M):
                at[k] = kept[k] = None
                if i >= d:
                    now.update(k, told)

    return now.finish(state, history=history, deltas=deltas, losses=losses, sums=now.sums, stash=stash)


def ddg(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    microbatches: int = 1,
    weight_prediction: float = 0.0,
    prediction_momentum: float = 1.0,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    global_clip: float | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """Decoupled parallel back-propagation with delayed gradients, DDG (Huo, Gu, Yang, Huang, ICML 2018).

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over a micro-batch, or ``(total, weight)``, whose quotient
        is the loss: totals and weights of micro-batches are added up separately.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``, of the gradient's mini-batch. The
        paper's optimizers are SGD, its Algorithm 1, and Adam, its Algorithm 2. A learning-rate schedule counts a
        stage's own updates, one per mini-batch: stage k follows it as back-propagation would, K-k micro-batches late.
      microbatches: M. Micro-batch m = 0..M-1 has the examples m, m+M, m+2M, ... of the mini-batch. Each stage makes one
        update per mini-batch, with the mean of their gradients, which are at most ceil((K-k)/M) updates late. 1 is the
        method of the paper; train with M >= K. B is a multiple of M, and of M D with D devices per stage.
      weight_prediction: a. Stage k < K runs forward with its weights moved on by a n times its last update, with n the
        number of updates until the gradient is used, K-k for M = 1. That is SpecTrain's prediction of the weights that
        the gradient will meet for a = 1 (:func:`fr_jax.staleness.predicted`). 0 is plain DDG. Otherwise stage k
        keeps its last update in ``opt_state[k]``, a copy of its weights, and makes one more copy for its forward pass.
      prediction_momentum: b, with which the last update fades in the prediction, as FTPipe has it: b + b^2 + .. + b^n
        instead of n; the optimizer's momentum. 1: it does not fade.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each stage's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``. The weights of stages k < K are
        not reused: they are those of kept VJPs.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.
      global_clip: G, the largest norm of the whole network's gradient: stage k's is scaled by min(1, G / ||g||).
        Nothing waits for it: ||g|| is that of stage k's gradient and of the newest of the others that it knows, those
        of the step before.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights and optimizer
        stay as they are, and so do statistics that would not be finite. ``Info.metrics["skipped/k"]`` is 1 then, or 0.

    Returns:
      The algorithm. K = 1 is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, ``microbatches`` below 1, a negative
        ``weight_prediction``, a ``prediction_momentum`` outside [0, 1]; from ``init`` and ``step`` on a batch that does
        not fit or cannot be split. (Weakly typed arrays, ``jnp.full((4, 3), 1.0)``, make VJPs of their own: give all
        batches one type.)

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.ddg(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.adam(0.01))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state = fit.init(jax.random.key(0), batch)
      >>> for _ in range(5):
      ...     state, info = fit.step(state, batch)
      >>> state.step, info.loss.shape
      (5, ())
    """
    setup = check_setup(
        stages,
        loss_fn,
        optimizer,
        placement,
        return_grads,
        donate,
        metrics_fn,
        microbatches,
        global_clip=global_clip,
        skip_nonfinite=skip_nonfinite,
        gradients="late",
    )
    remedies = delayed.Remedies(weight_prediction, prediction_momentum)
    setup = delayed.with_remedies(setup, remedies)
    return make_algorithm(setup, partial(init, remedies), partial(step, remedies), lambda: make_parts(remedies, setup))
