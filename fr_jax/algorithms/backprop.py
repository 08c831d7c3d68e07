"""Back-propagation over K modules, equations (1)-(3) of Huo, Gu, Huang 2018: the method with backward locking.

At iteration t, for modules k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x):

    forward   h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to module k+1                        (eq. 1)
    gradient  g_k^t = (dh_k^t / dw_k) . delta_k^t                                       (eq. 3)
    send      delta_{k-1}^t = (dh_k^t / dh_{k-1}) . delta_k^t  to module k-1             (eq. 3)
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t                                         (eq. 2)

Module K's delta is the gradient of the loss. Module k waits for delta_k^t of the same iteration; its VJP is kept until
then, without weights, which are still there. Where all modules live on the same device, the whole iteration is one
jitted function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Sharding

from fr_jax._arrays import put
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms._stages import KeyStream, Optimizers, Setup, check_batch, check_setup, init_modules
from fr_jax.types import Algorithm, Array, Batch, BatchSpec, Info, PyTree, Stage

__all__ = ["BackpropState", "backprop"]


class BackpropState(NamedTuple):
    """Nothing is in flight between steps; tuples have one entry a module, on the module's device.

    Attributes:
      step: t, mini-batches seen so far.
      params: w_k^t.
      model_state: running statistics of batch normalisation and the like.
      opt_state: the optimizers' states.
      streams: the modules' dropout keys and mini-batch counts.
      batch_spec: the shapes that a batch must have.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(setup: Setup, key: Array, batch: Batch) -> BackpropState:
    """Weights w^0."""
    modules = init_modules(setup, key, batch)
    return BackpropState(
        step=0,
        params=modules.params,
        model_state=modules.model_state,
        opt_state=modules.opt_state,
        streams=modules.streams,
        batch_spec=modules.batch_spec,
    )


class Parts(NamedTuple):
    """The jitted functions of the modules: K-1 of each of three, and the last module's one pass."""

    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    updates: tuple[Callable, ...]
    last: Callable


def make_parts(
    setup: Setup, loss_fn: steps.LossFn, metrics_fn: steps.MetricsFn | None, *, return_grads: bool, donate: bool
) -> Parts:
    """Forward, backward and update for each module k < K; on one device ``last`` is the whole network."""
    stages, optimizers, shardings = setup
    fused = len(set(shardings)) == 1
    below = range(0 if fused else len(stages) - 1)
    last = steps.make_train(
        stages[len(below) :],
        loss_fn,
        optimizers[len(below) :],
        shardings[-1],
        metrics_fn=metrics_fn,
        input_gradient=not fused,
        return_grads=return_grads,
        donate=donate,
    )
    return Parts(
        forwards=tuple(steps.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(steps.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        updates=tuple(steps.make_update(optimizers[k], shardings[k], donate=donate) for k in below),
        last=last,
    )


def step(parts: Parts, setup: Setup, state: BackpropState, batch: Batch) -> tuple[BackpropState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    check_batch(state.batch_spec, batch)
    K, shardings, below = len(setup.stages), setup.shardings, len(parts.forwards)
    params, model_state, opt_state = list(state.params), list(state.model_state), list(state.opt_state)
    streams = list(state.streams)
    grads: list[PyTree | None] = [None] * K
    norms: list[Array | None] = [None] * K
    vjps: list[Any] = []

    h = put(batch.inputs, shardings[0])
    for k in range(below):
        h, vjp, model_state[k], count = parts.forwards[k](params[k], model_state[k], streams[k], h)
        vjps.append(vjp)
        h = put(h, shardings[k + 1])
        streams[k] = streams[k]._replace(count=count)

    targets, fused = put(batch.targets, shardings[-1]), slice(below, K)
    top = parts.last(*map(tuple, (params[fused], model_state[fused], opt_state[fused], streams[fused])), h, targets)
    params[fused], model_state[fused], opt_state[fused] = top.params, top.model_state, top.opt_state
    streams[fused] = [s._replace(count=count) for s, count in zip(streams[fused], top.counts, strict=True)]
    grads[fused], norms[fused], delta = top.grads or (), top.gradient_norms, top.delta
    h = vjp = None  # nothing here keeps alive what has been used
    top = top._replace(delta=None)

    for k in reversed(range(below)):
        found, delta = parts.pulls[k](vjps.pop(), put(delta, shardings[k]), params[k])
        params[k], opt_state[k], norms[k] = parts.updates[k](params[k], opt_state[k], found)
        grads[k] = top.grads and found
        found = None

    state = BackpropState(
        step=state.step + 1,
        params=tuple(params),
        model_state=tuple(model_state),
        opt_state=tuple(opt_state),
        streams=tuple(streams),
        batch_spec=state.batch_spec,
    )
    returned = None if top.grads is None else tuple(grads)
    return state, Info(top.loss, returned, top.metrics | steps.named_norms(norms))


def backprop(
    stages: Sequence[Stage],
    loss_fn: steps.LossFn,
    optimizer: Optimizers,
    *,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: steps.MetricsFn | None = None,
) -> Algorithm:
    """Back-propagation over the same stages and devices as the decoupled methods.

    Args:
      stages: the K modules.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all modules, or a sequence of K. Each module has it to itself: what it
        takes over all weights, such as a global norm to clip by, is over the module's.
      placement: one sharding a module (:func:`fr_jax.placement`); None puts all on the default device. Where all are
        the same, a step is a single jitted function; ``placement(1, data_parallel=D)`` is data-parallel training.
      return_grads: also return each module's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by module K.

    Returns:
      The algorithm.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings; from ``init`` and ``step`` on a batch that
        does not fit.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> fit = fr.backprop([fr.from_linen(nn.Dense(1))], lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state = fit.init(jax.random.key(0), batch)
      >>> state, info = fit.step(state, batch)
      >>> state.step
      1
    """
    setup = check_setup(stages, optimizer, placement)
    parts = make_parts(setup, loss_fn, metrics_fn, return_grads=return_grads, donate=donate)
    return Algorithm(
        init=functools.partial(init, setup),
        step=functools.partial(step, parts, setup),
        predict=steps.make_predict(setup.stages, setup.shardings),
    )
