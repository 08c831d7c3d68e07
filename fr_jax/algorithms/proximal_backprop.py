"""Proximal back-propagation, ProxProp (Frerix, Möllenhoff, Moeller, Cremers 2018, arXiv:1706.04638): implicit steps.

At iteration t, for the layers l = 1..L of all stages with weights w_l and outputs h_l = F_l(h_{l-1}; w_l), h_0 = x:

    forward   h_l^t = F_l(h_{l-1}^t; w_l^t)
    error     delta_L^t = d loss / d h_L^t;   delta_{l-1}^t = (dh_l^t / dh_{l-1}) . delta_l^t
    solve     (A_l' A_l + I / tau) v_l = A_l' delta_l^t  for l < L,  A_l = dh_l^t / dw_l,  by n conjugate-gradient steps
              v_L = A_L' delta_L^t
    update    w_l^{t+1} = w_l^t - gamma_t v_l, or what the optimizer makes of v_l

w_l - v_l minimises  ||F_l(h_{l-1}; w) - (h_l - delta_l)||^2 / 2 + ||w - w_l||^2 / (2 tau)  if F_l is linear in w: it is
the proximal, or implicit, step of the paper, whose layers are linear and have activations between them. A layer here
may hold its activation: then F_l is linearised at w_l, and units that are switched off do not count.

As in the authors' code (tfrerix/proxprop) the last layer takes the explicit step, v_l is not divided by tau, and no
factor of tau stands before v_L. Unlike there, the conjugate gradients of a dense layer have one step length and not one
for each unit.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jax.sharding import Sharding

from fr_jax._placement import jit, replicated
from fr_jax.algorithms._losses import Told
from fr_jax.algorithms._microbatches import Shared, make_shared
from fr_jax.algorithms._stages import KeyStream, init_stages, layers_of
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_error
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_count, check_setup
from fr_jax.algorithms._vjp import with_weights, without_weights
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["ProximalBackpropState", "proximal_backprop"]


class Proximal(NamedTuple):
    """The checked arguments: tau, n."""

    step: float
    cg_steps: int


class ProximalBackpropState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`): nothing is in flight between steps."""

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    setup: Setup,
    parts: ProximalBackpropParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> ProximalBackpropState:
    """Weights w^0."""
    return ProximalBackpropState(**init_stages(setup, key, batch, params, model_state).fields())


class ProximalBackpropParts(NamedTuple):
    """The jitted functions of the K stages, the error, and the shared ones."""

    forwards: tuple[Callable, ...]
    error: Callable
    pulls: tuple[Callable, ...]
    shared: Shared


def make_parts(setup: Setup, own: Proximal) -> ProximalBackpropParts:
    """Forward and backward of every stage, and the error."""
    stages, last = setup.stages, len(setup.stages) - 1
    return ProximalBackpropParts(
        forwards=tuple(make_forward(stage, input_gradient=k > 0) for k, stage in enumerate(stages)),
        error=make_error(setup),
        pulls=tuple(
            make_pull(stage, own, sharding, input_gradient=k > 0, last=k == last)
            for k, (stage, sharding) in enumerate(zip(stages, setup.shardings, strict=True))
        ),
        shared=make_shared(setup),
    )


def make_forward(stage: Stage, *, input_gradient: bool) -> Callable:
    """``(params, model_state, stream, h_in) -> (h_out, vjps, model_state, count)``: with the VJP of each layer.

    The VJPs hold no weights. That of the network's first layer has no gradient of its input.
    """

    def run(params: PyTree, model_state: PyTree, key: Array, h: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        vjps, moved = [], []
        for j, layer in enumerate(layers_of(stage)):
            w, s = (params[j], model_state[j]) if stage.layers else (params, model_state)
            apply = lambda w, h, layer=layer, s=s: layer.apply(w, s, h, key=key, train=True)
            if j > 0 or input_gradient:
                h, vjp, new_state = jax.vjp(apply, w, h, has_aux=True)
            else:
                h, vjp, new_state = jax.vjp(functools.partial(apply, h=h), w, has_aux=True)
            vjps.append(vjp)
            moved.append(new_state)
        return h, tuple(vjps), _of_stage(stage, moved)

    def forward(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree) -> Any:
        h_out, vjps, new_state = without_weights(run, params, model_state, stream.at(), h_in)
        return h_out, vjps, new_state, stream.count + 1

    return jax.jit(forward)


def _of_stage(stage: Stage, layers: Sequence[PyTree]) -> PyTree:
    """What there is of each layer, in the form of the stage's weights."""
    return tuple(layers) if stage.layers else layers[0]


def make_pull(stage: Stage, own: Proximal, sharding: Sharding | None, *, input_gradient: bool, last: bool) -> Callable:
    """``(vjps, delta, params, sums) -> (v, delta_in)``: a stage's backward pass; there are no sums to add to.

    In the last layer with weights of the ``last`` stage, v is the gradient.
    """

    def pull(vjps: PyTree, delta: PyTree, params: PyTree, sums: None) -> tuple[PyTree, PyTree | None]:
        explicit, v = last, []
        for vjp in reversed(with_weights(vjps, params)):
            grads, *delta_in = vjp(delta)
            has_weights = bool(jax.tree.leaves(grads))
            v.append(implicit(own, vjp, delta, grads) if has_weights and not explicit else grads)
            explicit = explicit and not has_weights
            delta = delta_in[0] if delta_in else None
        return _of_stage(stage, v[::-1]), delta if input_gradient else None

    return jit(pull, out_shardings=(replicated(sharding), sharding))


def implicit(own: Proximal, vjp: Callable, delta: PyTree, grads: PyTree) -> PyTree:
    """The v with (A'A + I / tau) v = A' delta, for ``grads`` = A' delta; there is no matrix."""
    transposed = lambda delta: vjp(delta)[0]
    forward = jax.linear_transpose(transposed, delta)  # of A' it is A

    def product(v: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: a + b / own.step, transposed(*forward(v)), v)

    v = cg(product, grads, tol=0.0, maxiter=own.cg_steps)[0]
    # For gradients that are not finite cg stops at once, at zero, and nobody would see what happened.
    return jax.tree.map(lambda one, grad: jnp.where(jnp.isfinite(grad), one, grad), v, grads)


def step(
    setup: Setup, parts: ProximalBackpropParts, state: ProximalBackpropState, batch: Batch
) -> tuple[ProximalBackpropState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now, K = Iteration(setup, state, batch, parts.shared, any_size=True), len(setup.stages)
    vjps: list[Any] = []

    # Forward.
    h = now.send(batch.inputs, 0)
    for k in range(K):
        h, vjp = now.forward(k, parts.forwards[k], now.send(h, k))
        vjps.append(vjp)

    delta, now.loss, metrics = parts.error(h, now.send(batch.targets, -1))
    now.told, now.metrics = Told(now.loss), now.metrics | metrics
    h = vjp = None  # nothing here keeps alive what has been used

    # Backward, each as soon as delta arrives.
    for k in reversed(range(K)):
        delta = now.pull(k, parts.pulls[k], vjps.pop(), now.send(delta, k), now.params[k])
        now.update(k, now.told_for(k))

    return now.finish(state)


def check_own(proximal_step: float, cg_steps: int) -> Proximal:
    """Raises ValueError for a step that is not a number above 0, or a count below 1."""
    step: Any = proximal_step
    if not isinstance(step, numbers.Real) or isinstance(step, bool) or not 0 < float(step) < math.inf:
        raise ValueError(f"proximal_step = {step!r} was given; it must be a finite number above 0, such as 1.0.")
    return Proximal(float(step), check_count("cg_steps", cg_steps))


def proximal_backprop(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    proximal_step: float = 1.0,
    cg_steps: int = 3,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """Proximal back-propagation, ProxProp (Frerix et al. 2018): implicit steps of the weights of every layer.

    Stages wait for each other as in back-propagation. What a stage sends back is back-propagation's, so the numbers do
    not depend on the cuts. A layer does the work of n further forward and backward passes.

    Args:
      stages: the K stages. Layers that are linear in their weights, with activations as layers between them, give the
        method of the paper.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch, or ``(total, weight)``, whose quotient is the
        loss.
      optimizer: one optax transformation for all stages, or a sequence of K; it takes v_l for the gradient. Each stage
        runs its own: a global norm to clip by is that of the stage's v. ``update`` receives ``value=loss``.
      proximal_step: tau, above 0. For a small tau v_l is tau times the gradient, except in the last layer, which has
        the gradient: an optimizer such as Adam, which does not see the scale, is the easy choice.
      cg_steps: n, conjugate-gradient steps from v = 0 (the ``cg1``, ``cg3``, .. of the paper).
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each stage's v in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights, optimizer and
        statistics stay as they are. ``Info.metrics["skipped/k"]`` is then 1, else 0.

    Returns:
      The algorithm; ``gradient_norm/k`` is the norm of stage k's v. A single layer is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, ``proximal_step`` not above 0, ``cg_steps``
        below 1; from ``init`` and ``step`` on a batch that does not fit.

    Example:
      >>> import flax.linen as nn, fr_jax as fr, jax, jax.numpy as jnp, optax
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.proximal_backprop(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.adam(0.01), proximal_step=0.1)
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state, info = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> sorted(info.metrics)
      ['gradient_norm/1', 'gradient_norm/2']
    """
    setup = check_setup(
        stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn, skip_nonfinite=skip_nonfinite
    )
    own = check_own(proximal_step, cg_steps)
    return make_algorithm(setup, init, step, lambda: make_parts(setup, own))
