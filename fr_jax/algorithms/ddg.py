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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Sharding

from fr_jax.algorithms import _delayed as delayed
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms._history import History
from fr_jax.algorithms._stages import KeyStream, init_stages, zeros
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["DDGState", "ddg"]


class DDGState(NamedTuple):
    """Everything in flight, beside the fields of every state (:class:`fr_jax.types.State`).

    Attributes:
      history: the VJPs of the iterations s = t+k-K .. t-1 that stage k has not applied yet: K-k between steps, and
        one more inside a step. Their leaves are the stored activations, and the weights of that time.
      deltas: delta_k^t for k < K, as sent by stage k+1 at t-1; zeros before the first arrives.
      losses: the losses of the mini-batches of ``deltas``; ``()`` for a stage whose optimizer does not take them.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    history: tuple[History, ...]
    deltas: tuple[PyTree, ...]
    losses: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    setup: Setup, parts: DDGParts, key: Array, batch: Batch, params: tuple | None, model_state: tuple | None
) -> DDGState:
    """Weights w^0; deltas are zeros, and the VJPs are those of an input of zeros, which is never applied."""
    stages = init_stages(setup, key, batch, params, model_state)
    K = len(setup.stages)
    history = []
    for k in range(K - 1):
        h_in = zeros(stages.features[k], setup.shardings[k])
        with jax.debug_nans(False):  # a stage need not be defined there
            _, vjp, _, _ = parts.forwards[k](stages.params[k], stages.model_state[k], stages.streams[k], h_in)
        history.append(fifo.empty(K - 1 - k, lambda vjp=vjp: vjp))
    deltas, losses = delayed.nothing_sent(setup, stages, batch)
    return DDGState(**stages.fields(), history=tuple(history), deltas=deltas, losses=losses)


class DDGParts(NamedTuple):
    """The jitted functions: K-1 of each of four, and the last stage's one pass."""

    ahead: tuple[Callable, ...]
    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    updates: tuple[Callable, ...]
    last: Callable


def make_parts(setup: Setup, weight_prediction: float) -> DDGParts:
    """Prediction, forward, backward and update for each stage k < K, and the last stage.

    The weights are not donated: kept VJPs hold those of their time, and may share their buffers.
    """
    stages, shardings = setup.stages, setup.shardings
    below = range(len(stages) - 1)
    return DDGParts(
        ahead=delayed.make_ahead(shardings, weight_prediction),
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        updates=tuple(
            functions.make_update(setup.optimizers[k], shardings[k], donate=setup.donate, keep_params=True)
            for k in below
        ),
        last=functions.make_last(setup),
    )


def step(setup: Setup, parts: DDGParts, state: DDGState, batch: Batch) -> tuple[DDGState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now, K = Iteration(setup, state, batch, any_size=False), len(setup.stages)
    history, deltas, losses = list(state.history), list(state.deltas), list(state.losses)

    # Forward; the VJP is kept. It is made at w_hat, so the update below must not donate these weights.
    h = now.send(batch.inputs, 0)
    for k in range(K - 1):
        h, vjp = now.forward(k, parts.forwards[k], h, parts.ahead[k](now.params[k], now.opt_state[k]))
        history[k] = fifo.push(history[k], vjp)
        h = now.send(h, k + 1)

    # Stage K: forward, backward and update in one pass. Nothing here keeps alive what has been used.
    delta, h, vjp, loss = now.train(parts.last, h, batch.targets), None, None, now.loss

    # The others: gradient by the oldest VJP, update, send. delta_k was sent at t-1; what arrives now is for t+1.
    for k in reversed(range(K - 1)):
        if delta is not None:
            deltas[k], losses[k] = now.send(delta, k), delayed.send_loss(setup, loss, k)
        vjp, history[k] = fifo.pop(history[k])  # also while there is nothing to apply: that of init goes first
        delta, loss = None, state.losses[k]
        if now.t + (k + 1) - K >= 0:
            grads, delta = parts.pulls[k](vjp, state.deltas[k])
            now.update(k, parts.updates[k], grads, loss)
            grads = None

    return now.finish(state, history=history, deltas=deltas, losses=losses)


def ddg(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    weight_prediction: float = 0.0,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
) -> Algorithm:
    """Decoupled parallel back-propagation with delayed gradients, DDG (Huo, Gu, Yang, Huang, ICML 2018).

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``, of the gradient's mini-batch. The
        paper's optimizers are SGD, its Algorithm 1, and Adam, its Algorithm 2. A learning-rate schedule counts a
        stage's own updates, so stage k follows it K-k iterations late: by mini-batch, as back-propagation would.
      weight_prediction: a. Stage k < K runs forward with its weights moved on by a (K-k) times its last update, which
        is SpecTrain's prediction of the weights that the gradient will meet for a = 1
        (:func:`fr_jax.staleness.predicted`). 0 is plain DDG. Otherwise stage k keeps its last update in
        ``opt_state[k]``, a copy of its weights, and makes one more copy for its forward pass.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each stage's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``. The weights of stages k < K are
        not reused: kept VJPs may share their buffers.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.

    Returns:
      The algorithm. K = 1 is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, a negative ``weight_prediction``; from ``init``
        and ``step`` on a batch that does not fit. (Weakly typed arrays, ``jnp.full((4, 3), 1.0)``, make VJPs of their
        own: give all batches one type.)

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
    setup = check_setup(stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn)
    setup = delayed.with_prediction(setup, weight_prediction)
    return make_algorithm(setup, init, step, lambda: make_parts(setup, weight_prediction))
