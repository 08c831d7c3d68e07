"""PipeDream-2BW (Narayanan et al. 2021, arXiv:2006.09503): all stages one mini-batch late, two versions of weights.

For mini-batch t in M >= K micro-batches i = t M + m, stages k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x):

    forward   h_k^i = F_k(h_{k-1}^i; w_k^{t-1}),  sent to stage k+1; its VJP is kept
    gradient  g_k^t = 1/M sum_m (dh_k^i / dw_k) . delta_k^i,  by the VJPs at w_k^{t-1}
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t,  once                           (w^{-1} = w^0)
    send      delta_{k-1}^i = (dh_k^i / dh_{k-1}^i) . delta_k^i  to stage k-1

delta_K^i is the gradient of the loss. In sub-iteration i stage k goes forward over micro-batch i and backward over
micro-batch i-(K-k), so nothing waits and there is no bubble; a delay of 1 in all stages leaves the time for that. So
after step t, stages k < K have not yet made the update of mini-batch t, which they finish in the next step:
``params[k]`` are w_k^t, and those of stage K w_K^{t+1}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["PipeDream2BWState", "pipedream_2bw"]


class PipeDream2BWState(NamedTuple):
    """Everything in flight, beside the fields of every state (:class:`fr_jax.types.State`).

    Attributes:
      history: the VJPs of the last K-k micro-batches, which stage k < K has not applied yet, without weights.
      deltas: delta_k of the last micro-batch that stage k+1 has gone backward over; zeros before the first.
      losses: of the last whole mini-batch of ``deltas``, what the update of a stage needs (:class:`Told`).
      sums: the gradients that stage k < K has so far of the last mini-batch.
      previous: the weights of all stages one step ago; ``()`` for K = 1.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    history: tuple[History, ...]
    deltas: tuple[PyTree, ...]
    losses: tuple[Told, ...]
    sums: tuple[PyTree, ...]
    previous: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    setup: Setup, parts: PipeDream2BWParts, key: Array, batch: Batch, params: tuple | None, model_state: tuple | None
) -> PipeDream2BWState:
    """Weights w^0; deltas are zeros, and the VJPs are those of an input of zeros, which is never applied."""
    stages = init_stages(setup, key, batch, params, model_state)
    deltas, losses = delayed.nothing_sent(setup, stages)
    return PipeDream2BWState(
        **stages.fields(),
        history=delayed.vjps_of_zeros(setup, stages, parts.forwards),
        deltas=deltas,
        losses=losses,
        sums=delayed.nothing_added(setup, stages),
        previous=stages.params if len(setup.stages) > 1 else (),
    )


class PipeDream2BWParts(NamedTuple):
    """The jitted functions: K-1 of each of two, the last stage's one pass, and the shared ones."""

    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    last: Callable
    shared: Shared


def make_parts(setup: Setup) -> PipeDream2BWParts:
    """Forward and backward for each stage k < K, and the last stage. Two versions are kept: no weights are donated."""
    stages, shardings, donate = setup.stages, setup.shardings, setup.donate
    below = range(len(stages) - 1)
    return PipeDream2BWParts(
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0, donate_sums=donate) for k in below),
        last=make_last(setup),
        shared=make_shared(setup, holding=len(stages)),
    )


def step(
    setup: Setup, parts: PipeDream2BWParts, state: PipeDream2BWState, batch: Batch
) -> tuple[PipeDream2BWState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now = Iteration(setup, state, batch, parts.shared, any_size=False)
    K, M = len(setup.stages), setup.microbatches
    history, deltas, losses = list(state.history), list(state.deltas), list(state.losses)
    # w^{t-1} for mini-batch t: what stages k < K have now, since their last update is that of mini-batch t-2.
    at = (*state.params[:-1], *(state.previous or state.params)[-1:])

    for i, h, targets in now.microbatches(batch):
        # Forward; the VJP is kept.
        for k in range(K - 1):
            h, vjp = now.forward(k, parts.forwards[k], h, at[k])
            history[k] = fifo.push(history[k], vjp)
            h = now.send(h, k + 1)

        # Stage K: forward and backward in one pass. Nothing here keeps alive what has been used.
        delta, h, targets, vjp = now.train(parts.last, h, targets, params=at[-1:]), None, None, None
        told = now.conclude()

        # The others: gradient by the oldest VJP, update, send. delta_k was sent at i-1; delta is for i+1.
        for k in reversed(range(K - 1)):
            s = i - (K - 1 - k)
            vjp, history[k] = fifo.pop(history[k])  # also while there is nothing to apply: that of init goes first
            arrived, arrived_told = delayed.receive(now, k, s, delta, told, deltas, losses)
            delta, told = None, arrived_told
            if s >= 0:
                weights = at[k] if s >= now.t * M else state.previous[k]
                delta = now.pull(k, parts.pulls[k], vjp, arrived, weights)
            vjp = arrived = None
            if s >= 0 and delayed.is_whole(s, M):
                now.update(k, told)

    previous = state.params if K > 1 else ()
    return now.finish(state, history=history, deltas=deltas, losses=losses, sums=now.sums, previous=previous)


def pipedream_2bw(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    microbatches: int,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    global_clip: float | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """PipeDream-2BW (Narayanan et al. 2021, arXiv:2006.09503): all gradients one update late, two weight versions.

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over a micro-batch, or ``(total, weight)``, whose quotient
        is the loss: totals and weights of micro-batches are added up separately.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``, of the gradient's mini-batch.
      microbatches: M, at least K. Micro-batch m = 0..M-1 has the examples m, m+M, m+2M, ... of the mini-batch; one
        update per mini-batch with the mean of their gradients. B is a multiple of M, and of M D with D devices per
        stage.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each stage's gradient, the mean over the micro-batches, in ``Info.grads``: that of
        mini-batch t-1 for stages k < K.
      donate: reuse the buffers of the old state; it is then invalid after ``step``. Weights are not reused.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.
      global_clip: G, the largest norm of the whole network's gradient: stage k's is scaled by min(1, G / ||g||).
        Nothing waits for it: ||g|| is that of stage k's gradient and of the newest of the others that it knows, those
        of the step before.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights and optimizer
        stay as they are, and so do statistics that would not be finite. ``Info.metrics["skipped/k"]`` is 1 then, or 0.

    Returns:
      The algorithm. K = 1 has nothing to overlap, and is plain back-propagation without a delay.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, ``microbatches`` below K; from ``init`` and
        ``step`` on a batch that does not fit or cannot be split.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.pipedream_2bw(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1), microbatches=2)
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
    if setup.microbatches < len(setup.stages):
        raise ValueError(
            f"microbatches = {microbatches} was given for K = {len(setup.stages)} stages; PipeDream-2BW needs at least "
            "K, so that a stage has the whole gradient of a mini-batch before the next but one begins."
        )
    return make_algorithm(setup, init, step, lambda: make_parts(setup))
