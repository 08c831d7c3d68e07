"""Decoupled parallel back-propagation with delayed gradients (Huo, Gu, Yang, Huang, ICML 2018): DDG keeps old VJPs.

At iteration t, for modules k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x), and s = t+k-K:

    forward   h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to module k+1; its VJP at w_k^t is kept
    gradient  g_k^t = (dh_k^s / dw_k^s) . delta_k^t,  by the VJP kept at iteration s
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t
    send      delta_{k-1}^{t+1} = (dh_k^s / dh_{k-1}^s) . delta_k^t  to module k-1

Module K's delta is the gradient of the loss itself. delta_k^t was sent at t-1 and belongs to mini-batch s too, so g_k^t
is the gradient of back-propagation for mini-batch s at the weights w^s, K-k iterations late. While s < 0, module k has
nothing to apply and does not update. In code modules count from 0, so the staleness of module k is K-1-k.

With weight prediction, the forward pass and its VJP use ŵ_k^t instead, a prediction of w_k^{t+K-k}.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
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

__all__ = ["DDGState", "ddg"]


class DDGState(NamedTuple):
    """Everything in flight; tuples have one entry a module, on the module's device.

    Attributes:
      step: t, mini-batches seen so far.
      params: w_k^t.
      model_state: running statistics of batch normalisation and the like.
      opt_state: the optimizers' states.
      history: the VJPs of the iterations s = t+k-K .. t-1 that module k has not applied yet: K-k between steps, and
        one more inside a step. Their leaves are the stored activations, and the weights of that time.
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


def init(parts: Parts, setup: Setup, key: Array, batch: Batch) -> DDGState:
    """Weights w^0; deltas are zeros, and the VJPs are those of an input of zeros, which is never applied."""
    modules = init_modules(setup, key, batch)
    K = len(setup.stages)
    history, deltas = [], []
    for k in range(K - 1):
        here = setup.shardings[k]
        h_in = zeros(modules.features[k], here)
        with jax.debug_nans(False):  # a stage need not be defined there
            _, vjp, _, _ = parts.forwards[k](modules.params[k], modules.model_state[k], modules.streams[k], h_in)
        history.append(fifo.empty(K - 1 - k, lambda vjp=vjp: vjp))
        deltas.append(zeros(modules.features[k + 1], here))
    return DDGState(
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
    """The jitted functions of the modules: K-1 of each of four, and the last module's one pass."""

    ahead: tuple[Callable, ...]
    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    updates: tuple[Callable, ...]
    last: Callable


def make_parts(
    setup: Setup,
    loss_fn: steps.LossFn,
    metrics_fn: steps.MetricsFn | None,
    *,
    weight_prediction: float,
    return_grads: bool,
    donate: bool,
) -> Parts:
    """Prediction, forward, backward and update for each module k < K, and the last module.

    The weights are not donated: kept VJPs hold those of their time, and may share their buffers.
    """
    stages, optimizers, shardings = setup
    below = range(len(stages) - 1)
    last = steps.make_train(
        stages[-1:],
        loss_fn,
        optimizers[-1:],
        shardings[-1],
        metrics_fn=metrics_fn,
        input_gradient=len(stages) > 1,
        return_grads=return_grads,
        donate=donate,
    )
    return Parts(
        ahead=staleness.make_ahead(shardings, weight_prediction),
        forwards=tuple(steps.make_forward(stages[k], input_gradient=k > 0) for k in below),
        pulls=tuple(steps.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        updates=tuple(steps.make_update(optimizers[k], shardings[k], donate=donate, keep_params=True) for k in below),
        last=last,
    )


def step(parts: Parts, setup: Setup, state: DDGState, batch: Batch) -> tuple[DDGState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    check_batch(state.batch_spec, batch)
    t, K, shardings = iteration(state.step), len(setup.stages), setup.shardings
    params, model_state, opt_state = list(state.params), list(state.model_state), list(state.opt_state)
    history, deltas, streams = list(state.history), list(state.deltas), list(state.streams)
    grads: list[PyTree | None] = [None] * K
    norms: list[Array | None] = [None] * K

    # Forward; the VJP is kept.
    h = put(batch.inputs, shardings[0])
    for k in range(K - 1):
        w_hat = parts.ahead[k](params[k], opt_state[k])
        h, vjp, model_state[k], count = parts.forwards[k](w_hat, model_state[k], streams[k], h)
        history[k] = fifo.push(history[k], vjp)
        h = put(h, shardings[k + 1])
        streams[k] = streams[k]._replace(count=count)

    # Module K: forward, backward and update in one pass.
    top = parts.last(params[-1:], model_state[-1:], opt_state[-1:], streams[-1:], h, put(batch.targets, shardings[-1]))
    params[-1:], model_state[-1:], opt_state[-1:] = top.params, top.model_state, top.opt_state
    streams[-1] = streams[-1]._replace(count=top.counts[0])
    grads[-1], norms[-1], delta = top.grads and top.grads[0], top.gradient_norms[0], top.delta
    h = vjp = w_hat = None  # nothing here keeps alive what has been used
    top = top._replace(delta=None)

    # The others: gradient by the oldest VJP, update, send. delta_k was sent at t-1; what arrives now is for t+1.
    for k in reversed(range(K - 1)):
        if delta is not None:
            deltas[k] = put(delta, shardings[k])
        vjp, history[k] = fifo.pop(history[k])
        delta = None
        if t + (k + 1) - K >= 0:
            found, delta = parts.pulls[k](vjp, state.deltas[k])
            params[k], opt_state[k], norms[k] = parts.updates[k](params[k], opt_state[k], found)
            grads[k] = top.grads and found
            found = None

    state = DDGState(
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


def ddg(
    stages: Sequence[Stage],
    loss_fn: steps.LossFn,
    optimizer: Optimizers,
    *,
    weight_prediction: float = 0.0,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: steps.MetricsFn | None = None,
) -> Algorithm:
    """Decoupled parallel back-propagation with delayed gradients, DDG (Huo, Gu, Yang, Huang, ICML 2018).

    Args:
      stages: the K modules.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all modules, or a sequence of K. Each module has it to itself: what it
        takes over all weights, such as a global norm to clip by, is over the module's. The paper's are SGD, its
        Algorithm 1, and Adam, its Algorithm 2. A learning-rate schedule counts a module's own updates, so module k
        follows it K-k iterations late: by mini-batch, as back-propagation would.
      weight_prediction: a. Module k < K runs forward with its weights moved on by a (K-k) times its last update, which
        is SpecTrain's prediction of the weights that the gradient will meet for a = 1
        (:func:`fr_jax.staleness.predicted`). 0 is plain DDG. Otherwise module k keeps its last update in
        ``opt_state[k]``, a copy of its weights, and makes one more copy for its forward pass.
      placement: one sharding a module (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each module's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``. The weights of modules k < K are
        not reused: kept VJPs may share their buffers.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by module K.

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
    setup = staleness.with_prediction(check_setup(stages, optimizer, placement), weight_prediction)
    parts = make_parts(
        setup,
        loss_fn,
        metrics_fn,
        weight_prediction=weight_prediction,
        return_grads=return_grads,
        donate=donate,
    )
    return Algorithm(
        init=functools.partial(init, parts, setup),
        step=functools.partial(step, parts, setup),
        predict=steps.make_predict(setup.stages, setup.shardings),
    )
