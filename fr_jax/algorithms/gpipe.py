"""GPipe (Huang et al. 2019, arXiv:1811.06965): back-propagation over K stages, with the mini-batch in M micro-batches.

At iteration t, for stages k = 1..K with weights w_k, micro-batches m = 0..M-1 and inputs h_{k-1,m} (h_{0,m} = x_m):

    forward   h_{k,m}^t = F_k(h_{k-1,m}^t; w_k^t),  sent to stage k+1;                  for all m
    send      delta_{k-1,m}^t = (dh_{k,m}^t / dh_{k-1,m}) . delta_{k,m}^t  to stage k-1;  then for all m
    gradient  g_k^t = 1/M sum_m (dh_{k,m}^t / dw_k) . delta_{k,m}^t
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t,  once

delta_{K,m} is the gradient of the loss of micro-batch m. Stages work on different micro-batches at the same time, and
are idle only while the pipeline fills and empties: with f and b the time of a forward and a backward pass of one
micro-batch through one stage, an iteration takes (M+K-1)(f+b), a speedup over one device of KM/(M+K-1). g_k^t is the
gradient of back-propagation, with which the method is identical but for batch normalisation.

Stage K does both of its passes over micro-batch m at once, which takes no longer. The others keep M VJPs inside a
step, without weights, which do not change until its end; nothing between steps.

The schedule 1F1B (PipeDream-Flush, Narayanan et al. 2021, arXiv:2006.09503) does the same work in another order: stage
k goes backward over micro-batch m-(K-k) as soon as it has gone forward over micro-batch m. The numbers are the same,
and so is the time, but a stage keeps at most K-k+1 VJPs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from jax.sharding import Sharding

from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._microbatches import Shared, make_shared
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_last
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["GPipeState", "gpipe"]


class GPipeState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`): nothing is in flight between steps.

    ``streams`` count micro-batches, t M between steps; ``batch_spec`` is that of a whole mini-batch.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    setup: Setup, parts: GPipeParts, key: Array, batch: Batch, params: tuple | None, model_state: tuple | None
) -> GPipeState:
    """Weights w^0."""
    return GPipeState(**init_stages(setup, key, batch, params, model_state).fields())


class GPipeParts(NamedTuple):
    """The jitted functions: K-1 forwards and pulls, the last stage's one pass, and the shared ones."""

    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    last: Callable
    shared: Shared


def make_parts(setup: Setup) -> GPipeParts:
    """Forward and backward for each stage k < K, both in one for stage K."""
    stages, shardings = setup.stages, setup.shardings
    below = range(len(stages) - 1)
    return GPipeParts(
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        last=make_last(setup),
        shared=make_shared(setup),
    )


def all_forward_first(K: int, M: int) -> Iterator[tuple[bool, int, int]]:
    """GPipe's order of issue, ``(forward?, stage, micro-batch)``. Stage K goes backward with its forward pass."""
    yield from ((True, k, m) for m in range(M) for k in range(K))
    yield from ((False, k, m) for m in range(M) for k in reversed(range(K - 1)))


def one_forward_one_backward(K: int, M: int) -> Iterator[tuple[bool, int, int]]:
    """That of 1F1B: backward passes as soon as the delta was sent in the turn before."""
    for i in range(M + K - 1):
        yield from ((True, k, i) for k in range(K) if i < M)
        yield from ((False, k, i - (K - 1 - k)) for k in reversed(range(K - 1)) if 0 <= i - (K - 1 - k) < M)


SCHEDULES = {"gpipe": all_forward_first, "1f1b": one_forward_one_backward}


def step(schedule: str, setup: Setup, parts: GPipeParts, state: GPipeState, batch: Batch) -> tuple[GPipeState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now = Iteration(setup, state, batch, parts.shared, any_size=True)
    K, M = len(setup.stages), setup.microbatches
    microbatches, targets, h, vjp, delta = now.microbatches(batch), None, None, None, None
    vjps: list[list[Any]] = [[] for _ in range(K - 1)]
    deltas: list[list[PyTree]] = [[] for _ in range(K)]  # at k, what has been sent to stage k and not been used

    for forward, k, m in SCHEDULES[schedule](K, M):
        if forward and k == 0:
            _, h, targets = next(microbatches)
        if forward and k < K - 1:
            h, vjp = now.forward(k, parts.forwards[k], h)
            vjps[k].append(vjp)
            h = now.send(h, k + 1)
        elif forward:  # stage K: backward too, and with the last micro-batch its update
            delta, h, targets = now.train(parts.last, h, targets), None, None
            now.conclude()
        else:
            delta = now.pull(k, parts.pulls[k], vjps[k].pop(0), deltas[k].pop(0), now.params[k])
            if m == M - 1:
                now.update(k, now.told_for(k))
        if delta is not None:
            deltas[k - 1].append(now.send(delta, k - 1))
        vjp = delta = None  # nothing here keeps alive what has been used

    return now.finish(state)


def gpipe(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    microbatches: int,
    schedule: Literal["gpipe", "1f1b"] = "gpipe",
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    global_clip: float | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """GPipe (Huang et al. 2019, arXiv:1811.06965): M micro-batches forward, then backward, then one update.

    With g_{k,m} the gradient of micro-batch m for stage k: w_k^{t+1} = w_k^t - gamma_t 1/M sum_m g_{k,m}, which is
    the update of :func:`fr_jax.backprop` wherever the examples of a batch do not meet.

    - Dropout draws a mask of its own for every micro-batch.
    - Batch normalisation uses the statistics of the micro-batch, and running statistics move M times an iteration.

    Args:
      stages: the K stages. K = 1 is the accumulation of gradients.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over a micro-batch, whose mean over the micro-batches is the
        loss, or ``(total, weight)``, whose quotient is the loss: totals and weights are added up separately.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``.
      microbatches: M. Micro-batch m = 0..M-1 has the examples m, m+M, m+2M, ... of the batch, whose ``inputs`` and
        ``targets`` are ``(B, ...)``; B is a multiple of M, and of M D with D devices per stage.
      schedule: ``"gpipe"``, all forward passes first, or ``"1f1b"``: the same numbers in the same time, with the
        activations of at most K-k+1 micro-batches in stage k = 1..K instead of M.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device, where nothing
        runs at the same time.
      return_grads: also return each stage's gradient, the mean over the micro-batches, in ``Info.grads``.
      donate: reuse the buffers of the old weights and optimizer states; the old state is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of a micro-batch, computed by stage K. Reported
        are their means over the micro-batches, as for the loss.
      global_clip: G, the largest norm of the whole network's gradient g, which is scaled by min(1, G / ||g||). The
        updates of all stages then wait for the gradients of all.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights, optimizer and
        statistics stay as they are. ``Info.metrics["skipped/k"]`` is then 1, else 0.

    Returns:
      The algorithm. Inside a step, stages k < K keep the activations of all M micro-batches, or of K-k+1.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, ``microbatches`` that is not a whole number
        of at least 1, or an unknown ``schedule``; from ``init`` and ``step`` on a batch that does not fit or cannot be
        split.

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
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule = {schedule!r} is unknown; it can be {' or '.join(map(repr, SCHEDULES))}.")
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
        gradients="on time",
    )
    return make_algorithm(setup, init, functools.partial(step, schedule), lambda: make_parts(setup))
