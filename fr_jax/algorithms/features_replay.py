"""Features replay (Huo, Gu, Huang 2018), Algorithm 1: module k replays old features through today's weights.

At iteration t, for modules k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x):

    play      h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to module k+1                       (lines 4-8)
    replay    h~_k^t = F_k(h_{k-1}^{t+k-K}; w_k^t)                                      (line 11)
    gradient  g_k^t = (dh~_k^t / dw_k) . delta_k^t                                      (line 12, eq. 7)
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t                                         (line 13)
    send      delta_{k-1}^{t+1} = (dh~_k^t / dh_{k-1}) . delta_k^t  to module k-1       (line 14, eq. 6)

Module K's delta is the gradient of the loss itself, and its play is its replay. Modules do not wait for
each other inside an iteration: delta_k^t was sent at t-1. While t+k-K < 0, module k has nothing to replay
and does not update. In code modules count from 0, so the staleness of module k is K-1-k.

With weight prediction, lines 4-8 play with ŵ_k^t instead, a prediction of w_k^{t+K-k}, the weights of the replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from jax.sharding import Sharding

from fr_jax._arrays import put
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms import staleness
from fr_jax.algorithms._history import History
from fr_jax.algorithms._stages import (
    KeyStream,
    Optimizers,
    Setup,
    check_batch,
    check_setup,
    init_modules,
    iteration,
    zeros,
)
from fr_jax.types import Algorithm, Array, Batch, BatchSpec, Info, PyTree, Stage

__all__ = ["FeaturesReplayState", "features_replay"]

BATCH_STATS = ("play", "replay", "both")


class FeaturesReplayState(NamedTuple):
    """Everything in flight; tuples have one entry a module, on the module's device.

    Attributes:
      step: t, mini-batches seen so far.
      params: w_k^t.
      model_state: running statistics of batch normalisation and the like.
      opt_state: the optimizers' states.
      history: the inputs h_{k-1}^{s}, s = t+k-K .. t-1, that module k has played and not yet replayed: K-k
        between steps, and one more, the paper's K-k+1, inside a step.
      deltas: delta_k^t for k < K, as sent by module k+1 at t-1; zeros before the first arrives.
      streams: the modules' dropout keys and mini-batch counts.
      batch_spec: the shapes that a batch must have.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    history: tuple[History, ...]
    deltas: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(setup: Setup, key: Array, batch: Batch) -> FeaturesReplayState:
    """Line 1: weights w^0; histories and deltas are zeros."""
    modules = init_modules(setup, key, batch)
    K = len(setup.stages)
    history, deltas = [], []
    for k in range(K - 1):
        here = setup.shardings[k]
        history.append(fifo.empty(K - 1 - k, lambda h_in=modules.features[k], here=here: zeros(h_in, here)))
        deltas.append(zeros(modules.features[k + 1], here))
    return FeaturesReplayState(
        step=0,
        params=modules.params,
        model_state=modules.model_state,
        opt_state=modules.opt_state,
        history=tuple(history),
        deltas=tuple(deltas),
        streams=modules.streams,
        batch_spec=modules.batch_spec,
    )


class Parts(NamedTuple):
    """The jitted functions of the modules: K-1 predictions, plays and replays, and the last module's one pass."""

    ahead: tuple[Callable, ...]
    plays: tuple[Callable, ...]
    replays: tuple[Callable, ...]
    last: Callable


def make_parts(
    setup: Setup,
    loss_fn: steps.LossFn,
    metrics_fn: steps.MetricsFn | None,
    *,
    batch_stats: str,
    weight_prediction: float,
    return_grads: bool,
    donate: bool,
) -> Parts:
    """One prediction, play and replay for each module k < K, and the last module."""
    stages, optimizers, shardings = setup
    K = len(stages)
    plays, replays = [], []
    for k in range(K - 1):
        plays.append(steps.make_play(stages[k], shardings[k], update_stats=batch_stats != "replay", donate=donate))
        replays.append(
            steps.make_replay(
                stages[k],
                optimizers[k],
                shardings[k],
                staleness=K - 1 - k,
                input_gradient=k > 0,
                update_stats=batch_stats != "play",
                return_grads=return_grads,
                donate=donate,
            )
        )
    last = steps.make_train(
        stages[-1:],
        loss_fn,
        optimizers[-1:],
        shardings[-1],
        metrics_fn=metrics_fn,
        input_gradient=K > 1,
        return_grads=return_grads,
        donate=donate,
    )
    return Parts(staleness.make_ahead(shardings, weight_prediction), tuple(plays), tuple(replays), last)


def step(parts: Parts, setup: Setup, state: FeaturesReplayState, batch: Batch) -> tuple[FeaturesReplayState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    check_batch(state.batch_spec, batch)
    t, K, shardings = iteration(state.step), len(setup.stages), setup.shardings
    params, model_state, opt_state = list(state.params), list(state.model_state), list(state.opt_state)
    history, deltas, streams = list(state.history), list(state.deltas), list(state.streams)
    grads: list[PyTree | None] = [None] * K
    norms: list[Array | None] = [None] * K

    # Lines 3-8: play.
    h = put(batch.inputs, shardings[0])
    for k in range(K - 1):
        history[k] = fifo.push(history[k], h)
        w_hat = parts.ahead[k](params[k], opt_state[k])
        h, moved, count = parts.plays[k](w_hat, model_state[k], streams[k], h)
        model_state[k] = model_state[k] if moved is None else moved
        h = put(h, shardings[k + 1])
        streams[k] = streams[k]._replace(count=count)

    # Lines 6, 9 and 11-14 of module K, in one pass.
    top = parts.last(params[-1:], model_state[-1:], opt_state[-1:], streams[-1:], h, put(batch.targets, shardings[-1]))
    params[-1:], model_state[-1:], opt_state[-1:] = top.params, top.model_state, top.opt_state
    streams[-1] = streams[-1]._replace(count=top.counts[0])
    grads[-1], norms[-1], delta = top.grads and top.grads[0], top.gradient_norms[0], top.delta
    h = w_hat = None  # nothing here keeps alive what has been used
    top = top._replace(delta=None)

    # Lines 10-15 of the others: replay, gradient, update, send. delta_k was sent at t-1; what arrives now is for t+1.
    for k in reversed(range(K - 1)):
        if delta is not None:
            deltas[k] = put(delta, shardings[k])
        h_s, history[k] = fifo.pop(history[k])
        delta = None
        if t + (k + 1) - K >= 0:
            params[k], moved, opt_state[k], delta, grads[k], norms[k] = parts.replays[k](
                params[k], model_state[k], opt_state[k], streams[k], h_s, state.deltas[k]
            )
            model_state[k] = model_state[k] if moved is None else moved

    state = FeaturesReplayState(
        step=t + 1,
        params=tuple(params),
        model_state=tuple(model_state),
        opt_state=tuple(opt_state),
        history=tuple(history),
        deltas=tuple(deltas),
        streams=tuple(streams),
        batch_spec=state.batch_spec,
    )
    returned = None if top.grads is None else tuple(grads)
    return state, Info(top.loss, returned, top.metrics | steps.named_norms(norms))


def features_replay(
    stages: Sequence[Stage],
    loss_fn: steps.LossFn,
    optimizer: Optimizers,
    *,
    batch_stats: Literal["play", "replay", "both"] = "play",
    weight_prediction: float = 0.0,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: steps.MetricsFn | None = None,
) -> Algorithm:
    """Features replay, Algorithm 1 of Huo, Gu, Huang 2018 (arXiv:1807.04511).

    Args:
      stages: the K modules.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all modules, or a sequence of K. Each module has it to itself: what it
        takes over all weights, such as a global norm to clip by, is over the module's. A learning-rate schedule counts
        a module's own updates, so module k follows it K-k iterations late: by mini-batch, as back-propagation would.
      batch_stats: which pass moves the running statistics of batch normalisation: ``"play"``, once a mini-batch;
        ``"replay"``, once a replayed mini-batch; ``"both"``, as the authors' code does. Both passes normalise
        with the statistics of the batch in every case. Module K has one pass only.
      weight_prediction: a. Module k < K plays with its weights moved on by a (K-k) times its last update, which is
        SpecTrain's prediction of the weights of the replay for a = 1 (:func:`fr_jax.staleness.predicted`); replay and
        update act on today's weights. 0 is plain features replay. Otherwise module k keeps its last update in
        ``opt_state[k]``, a copy of its weights, and makes one more copy for its play.
      placement: one sharding a module (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each module's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by module K.

    Returns:
      The algorithm. K = 1 is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, an unknown ``batch_stats``, a negative
        ``weight_prediction``; from ``init`` and ``step`` on a batch that does not fit.

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
    setup = staleness.with_prediction(check_setup(stages, optimizer, placement), weight_prediction)
    parts = make_parts(
        setup,
        loss_fn,
        metrics_fn,
        batch_stats=batch_stats,
        weight_prediction=weight_prediction,
        return_grads=return_grads,
        donate=donate,
    )
    return Algorithm(
        init=functools.partial(init, setup),
        step=functools.partial(step, parts, setup),
        predict=steps.make_predict(setup.stages, setup.shardings),
    )
