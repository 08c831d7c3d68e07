"""GPipe (Huang et al. 2019, arXiv:1811.06965): back-propagation over K modules, with the mini-batch in M microbatches.

At iteration t, for modules k = 1..K with weights w_k, microbatches m = 0..M-1 and inputs h_{k-1,m} (h_{0,m} = x_m):

    forward   h_{k,m}^t = F_k(h_{k-1,m}^t; w_k^t),  sent to module k+1;                  for all m
    send      delta_{k-1,m}^t = (dh_{k,m}^t / dh_{k-1,m}) . delta_{k,m}^t  to module k-1;  then for all m
    gradient  g_k^t = 1/M sum_m (dh_{k,m}^t / dw_k) . delta_{k,m}^t
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t,  once

delta_{K,m} is the gradient of the loss of microbatch m. Modules work on different microbatches at the same time, and
are idle only while the pipeline fills and empties: with f and b the time of a forward and a backward pass of one
microbatch through one module, an iteration takes (M+K-1)(f+b), a speedup over one device of KM/(M+K-1). g_k^t is the
gradient of back-propagation, with which the method is identical but for batch normalisation.

Module K does both of its passes over microbatch m at once, which takes no longer. The others keep M VJPs inside a
step, without weights, which do not change until its end; nothing between steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding

from fr_jax._arrays import put
from fr_jax._placement import data_parallel_size, replicated
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms._losses import wide
from fr_jax.algorithms._stages import (
    KeyStream,
    Optimizers,
    Setup,
    check_batch,
    check_count,
    check_example,
    check_setup,
    init_modules,
)
from fr_jax.types import Algorithm, Array, Batch, BatchSpec, Info, PyTree, Stage

__all__ = ["GPipeState", "gpipe"]

MICROBATCHES = (
    " It must divide the batch size; 1 is back-propagation, M keep K devices busy for M / (M + K - 1) of the time."
)


class GPipeState(NamedTuple):
    """Nothing is in flight between steps; tuples have one entry a module, on the module's device.

    Attributes:
      step: t, mini-batches seen so far.
      params: w_k^t.
      model_state: running statistics of batch normalisation and the like.
      opt_state: the optimizers' states.
      streams: the modules' dropout keys and counts: of microbatches, t M between steps.
      batch_spec: the shapes that a batch (not a microbatch) must have.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(setup: Setup, M: int, key: Array, batch: Batch) -> GPipeState:
    """Weights w^0."""
    check_split(batch, M, setup.shardings)
    modules = init_modules(setup, key, batch)
    return GPipeState(
        step=0,
        params=modules.params,
        model_state=modules.model_state,
        opt_state=modules.opt_state,
        streams=modules.streams,
        batch_spec=modules.batch_spec,
    )


class Parts(NamedTuple):
    """The jitted functions: K-1 forwards and pulls, the last module's one pass, K means and updates, two splits."""

    split_inputs: Callable
    split_targets: Callable
    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    last: Callable
    accumulates: tuple[Callable, ...]
    updates: tuple[Callable, ...]


def make_parts(
    setup: Setup, M: int, loss_fn: steps.LossFn, metrics_fn: steps.MetricsFn | None, *, donate: bool
) -> Parts:
    """Forward and backward for each module k < K, both in one for module K; mean and update for all."""
    stages, optimizers, shardings = setup
    below = range(len(stages) - 1)
    return Parts(
        split_inputs=make_split(shardings[0], M),
        split_targets=make_split(shardings[-1], M),
        forwards=tuple(steps.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(steps.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        last=steps.make_loss_gradient(
            stages[-1], loss_fn, shardings[-1], metrics_fn=metrics_fn, input_gradient=len(stages) > 1
        ),
        accumulates=tuple(make_accumulate(sharding, count=M) for sharding in shardings),
        updates=tuple(steps.make_update(o, s, donate=donate) for o, s in zip(optimizers, shardings, strict=True)),
    )


def make_split(sharding: Sharding | None, M: int) -> Callable:
    """``x -> (x_0, ..., x_{M-1})``, where x_m has the rows m, m+M, m+2M, ... of x.

    Where contiguous rows of x lie on D devices, each device's own are split, and nothing is sent between devices.
    """

    def split(x: Array) -> tuple[Array, ...]:
        rows = x.reshape(x.shape[0] // M, M, *x.shape[1:])
        return tuple(jax.lax.index_in_dim(rows, m, axis=1, keepdims=False) for m in range(M))

    return jax.jit(split, out_shardings=sharding)


def make_accumulate(sharding: Sharding | None, *, count: int) -> Callable:
    """``(total, x) -> total + x / count``, leaf by leaf: a mean of ``count`` trees, which starts at ``total`` = None.

    It is added up in float32 at least. The buffers of ``total`` are always given back; those of ``x`` never.
    """

    def accumulate(total: PyTree | None, x: PyTree) -> PyTree:
        part = jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)) / count, x)
        return part if total is None else jax.tree.map(lambda a, b: a + b, total, part)

    return jax.jit(accumulate, donate_argnames="total", out_shardings=replicated(sharding))


def step(
    parts: Parts, setup: Setup, M: int, return_grads: bool, state: GPipeState, batch: Batch
) -> tuple[GPipeState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    check_split(batch, M, setup.shardings, "step()")
    check_batch(state.batch_spec, batch)
    K, shardings = len(setup.stages), setup.shardings
    params, model_state, opt_state = list(state.params), list(state.model_state), list(state.opt_state)
    streams = list(state.streams)
    totals: list[Any] = [None] * K
    norms: list[Array | None] = [None] * K
    vjps: list[list[Any]] = [[] for _ in range(K - 1)]
    deltas: list[PyTree | None] = []

    # Forward, all microbatches; module K also backward.
    inputs = list(parts.split_inputs(put(batch.inputs, shardings[0])))
    targets = list(parts.split_targets(put(batch.targets, shardings[-1])))
    while inputs:
        h = inputs.pop(0)
        for k in range(K - 1):
            h, vjp, model_state[k], count = parts.forwards[k](params[k], model_state[k], streams[k], h)
            vjps[k].append(vjp)
            h, streams[k] = put(h, shardings[k + 1]), streams[k]._replace(count=count)
        found, delta, model_state[-1], count = parts.last(params[-1], model_state[-1], streams[-1], h, targets.pop(0))
        streams[-1] = streams[-1]._replace(count=count)
        totals[-1] = parts.accumulates[-1](totals[-1], found)
        deltas.append(delta)
        h = vjp = found = delta = None  # nothing here keeps alive what has been used

    # Backward, all microbatches, in the order in which module K has sent them.
    while deltas:
        delta = deltas.pop(0)
        for k in reversed(range(K - 1)):
            found, delta = parts.pulls[k](vjps[k].pop(0), put(delta, shardings[k]), params[k])
            totals[k], found = parts.accumulates[k](totals[k], found), None

    # One update a module.
    totals[-1], loss, metrics = totals[-1]
    grads = tuple(totals) if return_grads else None
    for k in reversed(range(K)):
        params[k], opt_state[k], norms[k] = parts.updates[k](params[k], opt_state[k], totals.pop())

    state = GPipeState(
        step=state.step + 1,
        params=tuple(params),
        model_state=tuple(model_state),
        opt_state=tuple(opt_state),
        streams=tuple(streams),
        batch_spec=state.batch_spec,
    )
    return state, Info(loss, grads, metrics | steps.named_norms(norms))


def check_split(batch: Batch, M: int, shardings: Sequence[Sharding | None], called: str = "init()") -> None:
    """Raises ValueError where a batch cannot be split into M equal microbatches, and these over a stage's devices."""
    check_example(batch, called)
    B, D = batch.inputs.shape[0], math.lcm(*(data_parallel_size(sharding) for sharding in shardings))
    if B % (M * D):
        raise ValueError(
            f"a batch of {B} examples cannot be split into microbatches = {M} equal parts, each over data_parallel = "
            f"{D} device(s); the batch size must be a multiple of {M} * {D} = {M * D}. Change the batch size or the "
            "number of microbatches; drop or pad a last partial batch."
        )


def gpipe(
    stages: Sequence[Stage],
    loss_fn: steps.LossFn,
    optimizer: Optimizers,
    *,
    microbatches: int,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: steps.MetricsFn | None = None,
) -> Algorithm:
    """GPipe (Huang et al. 2019, arXiv:1811.06965): M microbatches forward, then backward, then one update.

    With g_{k,m} the gradient of microbatch m for module k: w_k^{t+1} = w_k^t - gamma_t 1/M sum_m g_{k,m}, which is
    the update of :func:`fr_jax.backprop` wherever the examples of a batch do not meet.

    - Dropout draws a mask of its own for every microbatch.
    - Batch normalisation uses the statistics of the microbatch, and running statistics move M times an iteration.

    Args:
      stages: the K modules. K = 1 is the accumulation of gradients.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the microbatch; the mean over the batch is the mean of
        these.
      optimizer: one optax transformation for all modules, or a sequence of K. Each module has it to itself: what it
        takes over all weights, such as a global norm to clip by, is over the module's.
      microbatches: M. Microbatch m = 0..M-1 has the examples m, m+M, m+2M, ... of the batch, whose ``inputs`` and
        ``targets`` are ``(B, ...)``; B is a multiple of M, and of M D with D devices a stage.
      placement: one sharding a module (:func:`fr_jax.placement`); None puts all on the default device, where nothing
        runs at the same time.
      return_grads: also return each module's gradient, the mean over the microbatches, in ``Info.grads``.
      donate: reuse the buffers of the old weights and optimizer states; the old state is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of a microbatch, computed by module K. Reported
        are their means over the microbatches, as for the loss.

    Returns:
      The algorithm. Inside a step, modules k < K keep the activations of all M microbatches.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, ``microbatches`` that is no whole number of at
        least 1; from ``init`` and ``step`` on a batch that does not fit or cannot be split.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.gpipe(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1), microbatches=2)
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state = fit.init(jax.random.key(0), batch)
      >>> state, info = fit.step(state, batch)
      >>> state.step, int(state.streams[0].count)
      (1, 2)
    """
    setup, M = check_setup(stages, optimizer, placement), check_count("microbatches", microbatches, why=MICROBATCHES)
    parts = make_parts(setup, M, loss_fn, metrics_fn, donate=donate)
    return Algorithm(
        init=functools.partial(init, setup, M),
        step=functools.partial(step, parts, setup, M, return_grads),
        predict=steps.make_predict(setup.stages, setup.shardings),
    )
