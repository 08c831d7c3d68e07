"""Back-propagation over K stages, equations (1)-(3) of Huo, Gu, Huang 2018: the method with backward locking.

At iteration t, for stages k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x):

    forward   h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to stage k+1                        (eq. 1)
    gradient  g_k^t = (dh_k^t / dw_k) . delta_k^t                                       (eq. 3)
    send      delta_{k-1}^t = (dh_k^t / dh_{k-1}) . delta_k^t  to stage k-1             (eq. 3)
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t                                         (eq. 2)

Stage K's delta is the gradient of the loss. Stage k waits for delta_k^t of the same iteration; its VJP is kept until
then, without weights, which are still there. If all stages live on the same device, the whole iteration is one
jitted function.

With M micro-batches all but the update happens for one micro-batch after the other: accumulation of gradients, which
has the batch statistics of the other methods' micro-batches and needs 1/M of the memory for activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Sharding

from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._microbatches import Shared, make_shared
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_last
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["BackpropState", "backprop"]


class BackpropState(NamedTuple):
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
    setup: Setup, parts: BackpropParts, key: Array, batch: Batch, params: tuple | None, model_state: tuple | None
) -> BackpropState:
    """Weights w^0."""
    return BackpropState(**init_stages(setup, key, batch, params, model_state).fields())


class BackpropParts(NamedTuple):
    """The jitted functions: K-1 of each of two, the last stage's one pass, and the shared ones."""

    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    last: Callable
    shared: Shared


def make_parts(setup: Setup) -> BackpropParts:
    """Forward and backward for each stage k < K; on one device ``last`` is the whole network."""
    stages, shardings = setup.stages, setup.shardings
    below = range(0 if len(set(shardings)) == 1 else len(stages) - 1)
    return BackpropParts(
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        last=make_last(setup, first=len(below)),
        shared=make_shared(setup),
    )


def step(setup: Setup, parts: BackpropParts, state: BackpropState, batch: Batch) -> tuple[BackpropState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now = Iteration(setup, state, batch, parts.shared, any_size=True)
    below, M = len(parts.forwards), setup.microbatches
    vjps: list[Any] = []

    for i, h, targets in now.microbatches(batch):
        # Forward. On one device there is nothing below: the whole network is one pass.
        for k in range(below):
            h, vjp = now.forward(k, parts.forwards[k], h)
            vjps.append(vjp)
            h = now.send(h, k + 1)

        # Nothing here keeps alive what has been used.
        delta, h, targets, vjp = now.train(parts.last, h, targets, slice(below, None)), None, None, None
        now.conclude(slice(below, None))

        # Backward, each as soon as delta arrives; a VJP is popped, so that its activations are free after it.
        for k in reversed(range(below)):
            delta = now.pull(k, parts.pulls[k], vjps.pop(), now.send(delta, k), now.params[k])
            if (i + 1) % M == 0:
                now.update(k, now.told_for(k))

    return now.finish(state)


def backprop(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    microbatches: int = 1,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    global_clip: float | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """Back-propagation over the same stages and devices as the decoupled methods.

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over a micro-batch, or ``(total, weight)``, whose quotient
        is the loss: totals and weights of micro-batches are added up separately.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``.
      microbatches: M. Micro-batch m = 0..M-1 has the examples m, m+M, m+2M, ... of the mini-batch; one update with the
        mean of their gradients. B is a multiple of M, and of M D with D devices per stage.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device. If all are
        the same, each micro-batch is a single jitted function; ``placement(1, data_parallel=D)`` is data-parallel
        training.
      return_grads: also return each stage's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.
      global_clip: G, the largest norm of the whole network's gradient g, which is scaled by min(1, G / ||g||). The
        updates of all stages then wait for the gradients of all.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights, optimizer and
        statistics stay as they are. ``Info.metrics["skipped/k"]`` is then 1, else 0.

    Returns:
      The algorithm.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, ``microbatches`` below 1; from ``init`` and
        ``step`` on a batch that does not fit or cannot be split.

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
    return make_algorithm(setup, init, step, lambda: make_parts(setup))
