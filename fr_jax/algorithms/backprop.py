"""Back-propagation over K stages, equations (1)-(3) of Huo, Gu, Huang 2018: the method with backward locking.

At iteration t, for stages k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x):

    forward   h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to stage k+1                        (eq. 1)
    gradient  g_k^t = (dh_k^t / dw_k) . delta_k^t                                       (eq. 3)
    send      delta_{k-1}^t = (dh_k^t / dh_{k-1}) . delta_k^t  to stage k-1             (eq. 3)
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t                                         (eq. 2)

Stage K's delta is the gradient of the loss. Stage k waits for delta_k^t of the same iteration; its VJP is kept until
then, without weights, which are still there. If all stages live on the same device, the whole iteration is one
jitted function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Sharding

from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["BackpropState", "backprop"]


class BackpropState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`): nothing is in flight between steps."""

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
    """The jitted functions: K-1 of each of three, and the last stage's one pass."""

    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    updates: tuple[Callable, ...]
    last: Callable


def make_parts(setup: Setup) -> BackpropParts:
    """Forward, backward and update for each stage k < K; on one device ``last`` is the whole network."""
    stages, shardings = setup.stages, setup.shardings
    below = range(0 if len(set(shardings)) == 1 else len(stages) - 1)
    return BackpropParts(
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0, keep_weights=False) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        updates=tuple(functions.make_update(setup.optimizers[k], shardings[k], donate=setup.donate) for k in below),
        last=functions.make_last(setup, first=len(below)),
    )


def step(setup: Setup, parts: BackpropParts, state: BackpropState, batch: Batch) -> tuple[BackpropState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now, below = Iteration(setup, state, batch, any_size=True), len(parts.forwards)
    vjps: list[Any] = []

    # Forward. On one device there is nothing below: the whole network is one pass.
    h = now.send(batch.inputs, 0)
    for k in range(below):
        h, vjp = now.forward(k, parts.forwards[k], h)
        vjps.append(vjp)
        h = now.send(h, k + 1)

    # Nothing here keeps alive what has been used.
    delta, h, vjp = now.train(parts.last, h, batch.targets, slice(below, None)), None, None

    # Backward and update, each as soon as delta arrives; a VJP is popped, so that its activations are free after it.
    for k in reversed(range(below)):
        grads, delta = parts.pulls[k](vjps.pop(), now.send(delta, k), now.params[k])
        now.update(k, parts.updates[k], grads, now.loss_for(k))
        grads = None

    return now.finish(state)


def backprop(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
) -> Algorithm:
    """Back-propagation over the same stages and devices as the decoupled methods.

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device. If all are
        the same, a step is a single jitted function; ``placement(1, data_parallel=D)`` is data-parallel training.
      return_grads: also return each stage's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.

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
    setup = check_setup(stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn)
    return make_algorithm(setup, init, step, lambda: make_parts(setup))
