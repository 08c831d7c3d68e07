"""Features replay (Huo, Gu, Huang 2018), Algorithm 1: stage k replays old features through today's weights.

At iteration t, for stages k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x):

    play      h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to stage k+1                       (lines 4-8)
    replay    h~_k^t = F_k(h_{k-1}^{t+k-K}; w_k^t)                                      (line 11)
    gradient  g_k^t = (dh~_k^t / dw_k) . delta_k^t                                      (line 12, eq. 7)
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t                                         (line 13)
    send      delta_{k-1}^{t+1} = (dh~_k^t / dh_{k-1}) . delta_k^t  to stage k-1       (line 14, eq. 6)

Stage K's delta is the gradient of the loss itself, and its play is its replay. Stages do not wait for
each other inside an iteration: delta_k^t was sent at t-1. While t+k-K < 0, stage k has nothing to replay
and does not update. In code stages count from 0, so the staleness of stage k is K-1-k.

With weight prediction, lines 4-8 play with ŵ_k^t instead, a prediction of w_k^{t+K-k}, the weights of the replay.

With M micro-batches all of this happens for each micro-batch i = t M + m, m = 0..M-1, instead of t, one after another,
except for the update: stage k makes one per mini-batch, with the mean of the M gradients, after the replay of the last
one. So a gradient is late by K-k micro-batches, ceil((K-k)/M) updates at most, and nothing waits (PACI,
arXiv:2606.07881, "mem" mode). With stashed weights, the replay uses those with which micro-batch s was played: then
the gradient is that of DDG.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from jax.sharding import Sharding

from fr_jax.algorithms import _delayed as delayed
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms._history import History
from fr_jax.algorithms._losses import Told
from fr_jax.algorithms._microbatches import Shared, make_shared
from fr_jax.algorithms._stages import KeyStream, init_stages, zeros
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_last
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["FeaturesReplayState", "features_replay"]

BATCH_STATS = ("play", "replay", "both")
REPLAY_WEIGHTS = ("current", "stashed")


class Options(NamedTuple):
    """The method's own arguments, checked."""

    stashed: bool = False
    batch_stats: str = "play"
    remedies: delayed.Remedies = delayed.Remedies()


class FeaturesReplayState(NamedTuple):
    """Everything in flight, beside the fields of every state (:class:`fr_jax.types.State`).

    Attributes:
      history: the inputs h_{k-1}^{s}, s = i+k-K .. i-1, that stage k has played and not yet replayed: K-k
        micro-batches between steps, and one more, the paper's K-k+1, inside a step.
      deltas: delta_k^i for k < K, as sent by stage k+1 at i-1; zeros before the first arrives.
      losses: of the last whole mini-batch of ``deltas``, what the update of a stage needs (:class:`Told`).
      sums: the gradients that stage k has so far of a mini-batch of which it has yet to replay the last (K-k) mod M
        micro-batches, added up; None if it has replayed all.
      stash: the weights, older than ``params``, with which ``history`` was played; empty unless they are stashed.
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
    options: Options,
    setup: Setup,
    parts: FeaturesReplayParts | None,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> FeaturesReplayState:
    """Line 1: weights w^0; histories and deltas are zeros."""
    stages = init_stages(setup, key, batch, params, model_state)
    late = range(len(setup.stages) - 1, 0, -1)  # by how many micro-batches
    history = [fifo.empty(d, lambda k=k: zeros(stages.features[k], setup.shardings[k])) for k, d in enumerate(late)]
    deltas, losses = delayed.nothing_sent(setup, stages)
    return FeaturesReplayState(
        **stages.fields(),
        history=tuple(history),
        deltas=deltas,
        losses=losses,
        sums=delayed.nothing_added(setup, stages),
        stash=tuple(
            options.remedies.versions(d, setup.microbatches).nothing_stashed(stages.params[k])
            for k, d in enumerate(late if options.stashed else ())
        ),
    )


class FeaturesReplayParts(NamedTuple):
    """The jitted functions: K-1 of each of four, the last stage's one pass, and the shared ones."""

    ahead: tuple[Callable, ...]
    back: tuple[Callable, ...]
    plays: tuple[Callable, ...]
    replays: tuple[Callable, ...]
    last: Callable
    shared: Shared


def make_parts(options: Options, setup: Setup) -> FeaturesReplayParts:
    """One prediction, play and replay for each stage k < K, and the last stage."""
    stages, shardings, donate = setup.stages, setup.shardings, setup.donate
    below = range(len(stages) - 1)
    return FeaturesReplayParts(
        ahead=delayed.make_ahead(shardings, options.remedies),
        back=delayed.make_back(shardings, options.remedies),
        plays=tuple(
            functions.make_play(stages[k], shardings[k], update_stats=options.batch_stats != "replay", donate=donate)
            for k in below
        ),
        replays=tuple(
            functions.make_replay(
                stages[k],
                setup.optimizers[k],
                shardings[k],
                M=setup.microbatches,
                staleness=len(below) - k,
                input_gradient=k > 0,
                update_stats=options.batch_stats != "play",
                return_grads=setup.return_grads,
                donate=donate,
                keep_params=options.stashed,
                skip=setup.skip_nonfinite,
            )
            for k in below
        ),
        last=make_last(setup),
        shared=make_shared(setup, holding=len(below) if options.stashed else 0),
    )


def step(
    options: Options, setup: Setup, parts: FeaturesReplayParts, state: FeaturesReplayState, batch: Batch
) -> tuple[FeaturesReplayState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now = Iteration(setup, state, batch, parts.shared, any_size=False)
    K, M = len(setup.stages), setup.microbatches
    history, stash = list(state.history), list(state.stash)
    deltas, losses = list(state.deltas), list(state.losses)
    at: list[Any] = [None] * (K - 1)  # the weights with which a stage plays, until its next update

    for i, h, targets in now.microbatches(batch):
        # Lines 3-8: play, all the way down before anything else is issued: stage k+1 waits for nothing but this.
        for k in range(K - 1):
            history[k] = fifo.push(history[k], h)
            if at[k] is None:
                at[k] = parts.ahead[k](now.params[k], now.opt_state[k], delayed.horizon(i, K - 1 - k, M))
            h = now.play(k, parts.plays[k], h, at[k])

        # Lines 6, 9 and 11-14 of stage K, in one pass. h is dropped: its buffer is donated, or free once it is read.
        delta, h, targets = now.train(parts.last, h, targets), None, None
        told = now.conclude()

        # Lines 10-15 of the others: replay, gradient, update, send. delta_k was sent at i-1; delta is for i+1.
        for k in reversed(range(K - 1)):
            d = K - 1 - k
            h_s, history[k] = fifo.pop(history[k])  # also while there is nothing to replay: the zeros of init go first
            arrived, arrived_told = delayed.receive(now, k, i - d, delta, told, deltas, losses)
            delta, told = None, arrived_told
            if options.stashed:
                weights, stash[k] = options.remedies.versions(d, M).turn(stash[k], at[k], i)
            else:
                weights = parts.back[k](now.params[k], now.opt_state[k], delayed.horizon(i - d, d, M))
            if i >= d:
                delta = now.replay(k, parts.replays[k], h_s, arrived, told, weights)
            h_s = arrived = weights = None
            if delayed.is_whole(i - d, M):
                at[k] = None
                if i >= d:
                    now.update(k, told)  # with M = 1 the replay has made it

    return now.finish(state, history=history, deltas=deltas, losses=losses, sums=now.sums, stash=stash)


def features_replay(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    microbatches: int = 1,
    replay_weights: Literal["current", "stashed"] = "current",
    batch_stats: Literal["play", "replay", "both"] = "play",
    weight_prediction: float = 0.0,
    prediction_momentum: float = 1.0,
    discrepancy_decay: float = 1.0,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    global_clip: float | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """Features replay, Algorithm 1 of Huo, Gu, Huang 2018 (arXiv:1807.04511).

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over a micro-batch, or ``(total, weight)``, whose quotient
        is the loss: totals and weights of micro-batches are added up separately.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``, of the gradient's mini-batch. A
        learning-rate schedule counts a stage's own updates, one per mini-batch, so stage k follows it as
        back-propagation would, K-k micro-batches late.
      microbatches: M. Micro-batch m = 0..M-1 has the examples m, m+M, m+2M, ... of the mini-batch. Each stage makes one
        update per mini-batch, with the mean of their gradients, which are at most ceil((K-k)/M) updates late. 1 is the
        method of the paper; train with M >= K. B is a multiple of M, and of M D with D devices per stage.
      replay_weights: ``"current"``, the paper's, or ``"stashed"``: stage k replays with the weights with which the
        micro-batch was played, and so has the gradients of :func:`fr_jax.ddg` for the memory of features replay and
        at most ceil((K-k)/M) old copies of its weights. (What a stage's state does to its outputs in training, which
        is nothing in batch normalisation, is that of the replay.)
      batch_stats: which pass moves the running statistics of batch normalisation: ``"play"``, once per
        micro-batch; ``"replay"``, once per replayed micro-batch; ``"both"``, as the authors' code does. Both passes
        normalise with the statistics of the micro-batch in every case. Stage K has one pass only.
      weight_prediction: a. Stage k < K plays with its weights moved on by a n times its last update, with n the number
        of updates until the replay, K-k for M = 1. That is SpecTrain's prediction of the weights of the replay for
        a = 1 (:func:`fr_jax.staleness.predicted`); replay and update act on today's weights. 0 is plain features
        replay. Otherwise stage k keeps its last update in ``opt_state[k]``, a copy of its weights, and makes one more
        copy for its play.
      prediction_momentum: b, with which the last update fades in the prediction, as FTPipe has it: b + b^2 + .. + b^n
        instead of n; the optimizer's momentum. 1: it does not fade.
      discrepancy_decay: D. Below 1, stage k < K replays with its weights moved back by n times the running mean of its
        updates, to about those of the play (PipeMare's T2, :func:`fr_jax.staleness.corrected`). Then it keeps that mean
        in ``opt_state[k]``. Usual values are 0.1 to 0.5; 1 is off.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each stage's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.
      global_clip: G, the largest norm of the whole network's gradient: stage k's is scaled by min(1, G / ||g||).
        Nothing waits for it: ||g|| is that of stage k's gradient and of the newest of the others that it knows, those
        of the step before.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights and optimizer
        stay as they are, and so do statistics that would not be finite. ``Info.metrics["skipped/k"]`` is 1 then, or 0.

    Returns:
      The algorithm. K = 1 is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, an unknown ``batch_stats`` or
        ``replay_weights``, ``microbatches`` below 1, a remedy out of its bounds, prediction and correction together, or
        correction of stashed weights; from ``init`` and ``step`` on a batch that does not fit or cannot be split.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.features_replay(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state = fit.init(jax.random.key(0), batch)
      >>> for _ in range(5):
      ...     state, info = fit.step(state, batch)
      >>> state.step, info.loss.shape
      (5, ())
    """
    if batch_stats not in BATCH_STATS:
        raise ValueError(f"batch_stats = {batch_stats!r} is unknown; it can be 'play', 'replay' or 'both'.")
    if replay_weights not in REPLAY_WEIGHTS:
        raise ValueError(f"replay_weights = {replay_weights!r} is unknown; it can be 'current' or 'stashed'.")
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
    remedies = delayed.Remedies(weight_prediction, prediction_momentum, discrepancy_decay)
    setup = delayed.with_remedies(setup, remedies)
    if replay_weights == "stashed" and discrepancy_decay < 1:
        raise ValueError(
            f"replay_weights = 'stashed' and discrepancy_decay = {discrepancy_decay} were given: stashed weights are "
            "those of the play, so there is nothing to correct. Use one of them."
        )
    options = Options(replay_weights == "stashed", batch_stats, remedies)
    return make_algorithm(setup, partial(init, options), partial(step, options), lambda: make_parts(options, setup))
