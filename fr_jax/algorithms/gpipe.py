"""GPipe (Huang et al. 2019, arXiv:1811.06965): back-propagation over K stages, with the mini-batch in M microbatches.

At iteration t, for stages k = 1..K with weights w_k, microbatches m = 0..M-1 and inputs h_{k-1,m} (h_{0,m} = x_m):

    forward   h_{k,m}^t = F_k(h_{k-1,m}^t; w_k^t),  sent to stage k+1;                  for all m
    send      delta_{k-1,m}^t = (dh_{k,m}^t / dh_{k-1,m}) . delta_{k,m}^t  to stage k-1;  then for all m
    gradient  g_k^t = 1/M sum_m (dh_{k,m}^t / dw_k) . delta_{k,m}^t
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t,  once

delta_{K,m} is the gradient of the loss of microbatch m. Stages work on different microbatches at the same time, and
are idle only while the pipeline fills and empties: with f and b the time of a forward and a backward pass of one
microbatch through one stage, an iteration takes (M+K-1)(f+b), a speedup over one device of KM/(M+K-1). g_k^t is the
gradient of back-propagation, with which the method is identical but for batch normalisation.

Stage K does both of its passes over microbatch m at once, which takes no longer. The others keep M VJPs inside a
step, without weights, which do not change until its end; nothing between steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Sharding

from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._microbatches import check_split, make_accumulate, make_split
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_count, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["GPipeState", "gpipe"]

MICROBATCHES = (
    " It must divide the batch size; 1 is back-propagation, M keep K devices busy for M / (M + K - 1) of the time."
)


class GPipeState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`): nothing is in flight between steps.

    ``streams`` count microbatches, t M between steps; ``batch_spec`` is that of a whole mini-batch.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    M: int,
    setup: Setup,
    parts: GPipeParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> GPipeState:
    """Weights w^0."""
    check_split(batch, M, setup.shardings)
    return GPipeState(**init_stages(setup, key, batch, params, model_state).fields())


class GPipeParts(NamedTuple):
    """The jitted functions: K-1 forwards and pulls, the last stage's one pass, K means and updates, two splits."""

    split_inputs: Callable
    split_targets: Callable
    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    last: Callable
    accumulates: tuple[Callable, ...]
    updates: tuple[Callable, ...]


def make_parts(setup: Setup, M: int) -> GPipeParts:
    """Forward and backward for each stage k < K, both in one for stage K; mean and update for all."""
    stages, shardings = setup.stages, setup.shardings
    below = range(len(stages) - 1)
    return GPipeParts(
        split_inputs=make_split(shardings[0], M),
        split_targets=make_split(shardings[-1], M),
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        last=functions.make_loss_gradient(
            stages[-1],
            setup.loss_fn,
            shardings[-1],
            metrics_fn=setup.metrics_fn,
            input_gradient=len(stages) > 1,
        ),
        accumulates=tuple(make_accumulate(sharding, count=M) for sharding in shardings),
        updates=tuple(
            functions.make_update(optimizer, sharding, donate=setup.donate)
            for optimizer, sharding in zip(setup.optimizers, shardings, strict=True)
        ),
    )


def step(M: int, setup: Setup, parts: GPipeParts, state: GPipeState, batch: Batch) -> tuple[GPipeState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    check_split(batch, M, setup.shardings, "step()")
    now, K = Iteration(setup, state, batch, any_size=True), len(setup.stages)
    totals: list[Any] = [None] * K
    vjps: list[list[Any]] = [[] for _ in range(K - 1)]
    deltas: list[PyTree | None] = []

    # Forward, all microbatches; stage K also backward.
    inputs = list(parts.split_inputs(now.send(batch.inputs, 0)))
    targets = list(parts.split_targets(now.send(batch.targets, K - 1)))
    while inputs:
        h = inputs.pop(0)
        for k in range(K - 1):
            h, vjp = now.forward(k, parts.forwards[k], h)
            vjps[k].append(vjp)
            h = now.send(h, k + 1)
        found, delta = now.last(parts.last, h, targets.pop(0))
        totals[-1] = parts.accumulates[-1](totals[-1], found)
        deltas.append(delta)
        h = vjp = found = delta = None  # nothing here keeps alive what has been used

    # Backward, all microbatches, in the order in which stage K has sent them.
    while deltas:
        delta = deltas.pop(0)
        for k in reversed(range(K - 1)):
            found, delta = parts.pulls[k](vjps[k].pop(0), now.send(delta, k), now.params[k])
            totals[k], found = parts.accumulates[k](totals[k], found), None

    # One update per stage, from the last on, whose sum is complete first.
    totals[-1], now.loss, now.metrics = totals[-1]
    for k in reversed(range(K)):
        now.update(k, parts.updates[k], totals.pop(), now.loss_for(k))

    return now.finish(state)


def gpipe(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    microbatches: int,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
) -> Algorithm:
    """GPipe (Huang et al. 2019, arXiv:1811.06965): M microbatches forward, then backward, then one update.

    With g_{k,m} the gradient of microbatch m for stage k: w_k^{t+1} = w_k^t - gamma_t 1/M sum_m g_{k,m}, which is
    the update of :func:`fr_jax.backprop` wherever the examples of a batch do not meet.

    - Dropout draws a mask of its own for every microbatch.
    - Batch normalisation uses the statistics of the microbatch, and running statistics move M times an iteration.

    Args:
      stages: the K stages. K = 1 is the accumulation of gradients.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the microbatch; the mean over the batch is the mean of
        these.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``.
      microbatches: M. Microbatch m = 0..M-1 has the examples m, m+M, m+2M, ... of the batch, whose ``inputs`` and
        ``targets`` are ``(B, ...)``; B is a multiple of M, and of M D with D devices per stage.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device, where nothing
        runs at the same time.
      return_grads: also return each stage's gradient, the mean over the microbatches, in ``Info.grads``.
      donate: reuse the buffers of the old weights and optimizer states; the old state is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of a microbatch, computed by stage K. Reported
        are their means over the microbatches, as for the loss.

    Returns:
      The algorithm. Inside a step, stages k < K keep the activations of all M microbatches.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, ``microbatches`` that is not a whole number
        of at least 1; from ``init`` and ``step`` on a batch that does not fit or cannot be split.

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
    M = check_count("microbatches", microbatches, why=MICROBATCHES)
    setup = check_setup(stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn)
    return make_algorithm(setup, functools.partial(init, M), functools.partial(step, M), lambda: make_parts(setup, M))
