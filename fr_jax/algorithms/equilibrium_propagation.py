"""Equilibrium propagation (Scellier, Bengio 2017, arXiv:1602.05179): gradients from two states of rest.

A dense network with layers l = 1..L, weights W_l, b_l and units s_l in [0, 1]; s_0 = x, or c x. The energy of an
example, and its cost against the target y, are

    E(s; W) = sum_l  ||s_l||^2 / 2 - s_l . (s_{l-1} W_l + b_l)        C(s) = ||s_L - y||^2 / 2

All units move at once down the slope of F = E + beta C, and stay within their bounds:

    s <- clip(s - epsilon dF/ds, 0, 1)
    -dF/ds_l = s_{l-1} W_l + b_l + s_{l+1} W_{l+1}' - s_l,  for l = L without s_{l+1}, and with beta (y - s_L)

    free phase    from s = 0 with beta = 0 to s^0, the prediction is s_L^0
    nudged phase  from s^0 with beta to s^beta; the centred estimator has another from s^0 with -beta to s^-beta
    gradient      dC/dW ~ (dE/dW(s^beta) - dE/dW(s^0)) / beta,  or  (dE/dW(s^beta) - dE/dW(s^-beta)) / (2 beta)
    update        by the optimizer, with the mean over the batch

The centred estimator is that of Laborieux et al. (2021, arXiv:2101.05536): its error is of the order of beta^2, that of
the first one of the order of beta. With epsilon = 1 the dynamics are those of their code, with this clip as activation;
the first paper has epsilon = 0.5 and lets each free phase of an example begin where the last one ended.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from fr_jax._placement import jit, replicated
from fr_jax.algorithms._dense import affine, check_sizes, dense_network, goals
from fr_jax.algorithms._functions import optimize
from fr_jax.algorithms._losses import combine, score
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import Trained
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_count, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, MetricsFn, PyTree

__all__ = ["EquilibriumPropagationState", "equilibrium_propagation"]


class Relaxation(NamedTuple):
    """The checked arguments: beta, whether the estimator is centred, steps of the phases, epsilon, c."""

    beta: float
    centred: bool
    free_steps: int
    nudged_steps: int
    step_size: float
    input_scale: float = 1.0


class EquilibriumPropagationState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`), of one stage, whose params have an entry per layer."""

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    setup: Setup, parts: Callable, key: Array, batch: Batch, params: tuple | None, model_state: tuple | None
) -> EquilibriumPropagationState:
    """Weights W^0."""
    return EquilibriumPropagationState(**init_stages(setup, key, batch, params, model_state).fields())


def energy(params: Sequence[PyTree], s: Sequence[Array], x: Array) -> Array:
    """E, the mean over the batch."""
    below = (x, *s[:-1])
    terms = [jnp.sum(s_l**2) / 2 - jnp.sum(s_l * affine(p, h)) for p, s_l, h in zip(params, s, below, strict=True)]
    return sum(terms[1:], terms[0]) / x.shape[0]


def relax(
    own: Relaxation, params: Sequence[PyTree], s: Sequence[Array], x: Array, y: Array, beta: float, steps: int
) -> tuple[Array, ...]:
    """The units after so many steps on F."""
    drive = affine(params[0], x)  # does not change

    def step(_: Any, s: tuple[Array, ...]) -> tuple[Array, ...]:
        from_below = (drive, *(affine(p, below) for p, below in zip(params[1:], s, strict=False)))
        last = beta * (y - s[-1])
        from_above = (*(above @ p["kernel"].T for p, above in zip(params[1:], s[1:], strict=True)), last)
        move = lambda s_l, below, above: jnp.clip(s_l + own.step_size * (below + above - s_l), 0, 1)
        return tuple(map(move, s, from_below, from_above))

    return jax.lax.fori_loop(0, steps, step, tuple(s))


def free_phase(own: Relaxation, params: Sequence[PyTree], x: Array) -> tuple[Array, ...]:
    """The units at rest, s^0, for inputs ``(B, ...)``."""
    s = tuple(jnp.zeros((x.shape[0], *p["bias"].shape), p["bias"].dtype) for p in params)
    return relax(own, params, s, x, s[-1], 0.0, own.free_steps)


def gradients(own: Relaxation, params: Sequence[PyTree], s: Sequence[Array], x: Array, y: Array) -> PyTree:
    """The estimate of dC/dW from the units at rest, the mean over the batch."""
    nudged = lambda beta: relax(own, params, s, x, y, beta, own.nudged_steps)
    first, second = nudged(own.beta), nudged(-own.beta) if own.centred else s
    slope = jax.grad(energy)
    scale = own.beta * (2 if own.centred else 1)
    return jax.tree.map(lambda a, b: (a - b) / scale, slope(params, first, x), slope(params, second, x))


def make_parts(setup: Setup, own: Relaxation) -> Callable:
    """``(params, model_state, opt_state, streams, inputs, targets) -> Trained``: an iteration as one function."""
    optimizer, sharding = setup.optimizers[0], setup.shardings[0]

    def train(params: tuple, model_state: tuple, opt_state: tuple, streams: tuple, x: Array, targets: Array) -> Trained:
        x = own.input_scale * x
        s = free_phase(own, params[0], x)
        y = goals(targets, s[-1])
        loss, _, metrics = combine([score(setup.loss_fn, setup.metrics_fn, s[-1], targets)])
        after = relax(own, params[0], s, x, y, 0.0, 1)
        change = [jnp.max(jnp.abs(a - b)) for a, b in zip(after, s, strict=True)]
        grads = gradients(own, params[0], s, x, y)
        new = optimize(optimizer, params[0], opt_state[0], grads, loss, skip=setup.skip_nonfinite)
        return Trained(
            params=(new.params,),
            model_state=model_state,
            opt_state=(new.opt_state,),
            counts=tuple(stream.count + 1 for stream in streams),
            delta=None,
            loss=loss,
            grads=(grads,) if setup.return_grads else None,
            measured=(new.measured,),
            metrics={**metrics, "free_change": functools.reduce(jnp.maximum, change)},
        )

    donated = ("params", "opt_state") if setup.donate else ()
    return jit(train, donate_argnames=donated, out_shardings=replicated(sharding))


def step(
    setup: Setup, parts: Callable, state: EquilibriumPropagationState, batch: Batch
) -> tuple[EquilibriumPropagationState, Info]:
    """Iteration t, one jitted function."""
    now = Iteration(setup, state, batch, any_size=True)
    now.train(parts, now.send(batch.inputs, 0), batch.targets)
    return now.finish(state)


def squared_error(outputs: Array, targets: Array) -> Array:
    """C, the mean over the batch."""
    return jnp.sum((outputs - goals(targets, outputs)) ** 2) / 2 / outputs.shape[0]


def check_own(
    beta: float, centred: bool, free_steps: int, nudged_steps: int, step_size: float, input_scale: float
) -> Relaxation:
    """Raises ValueError for a number or a count that cannot be used."""
    given: dict[str, tuple[Any, float]] = {
        "beta": (beta, math.inf),
        "step_size": (step_size, 1.0),
        "input_scale": (input_scale, math.inf),
    }
    for name, (value, most) in given.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 < float(value) <= most or value == math.inf:
            bound = "a finite number above 0" if most == math.inf else f"a number above 0, at most {most:g}"
            raise ValueError(f"{name} = {value!r} was given; it must be {bound}.")
    counts = check_count("free_steps", free_steps), check_count("nudged_steps", nudged_steps)
    return Relaxation(float(beta), centred, *counts, float(step_size), float(input_scale))


def equilibrium_propagation(
    layer_sizes: Sequence[int],
    optimizer: Optimizers,
    *,
    beta: float = 0.5,
    centred: bool = True,
    free_steps: int = 50,
    nudged_steps: int = 20,
    step_size: float = 0.5,
    input_scale: float = 1.0,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """Equilibrium propagation (Scellier, Bengio 2017) of a dense network with units between 0 and 1.

    The network is not cut: it is one stage, whose layers settle together. Its loss is the squared error of the units of
    the last layer at rest, and its prediction those units. The estimate is the gradient of back-propagation through the
    converged free phase, but for an error of the order of beta (beta^2 if centred) and what the phases leave undone.

    Args:
      layer_sizes: n_0..n_L, the values of an input, the units of each layer; the last are the outputs.
      optimizer: an optax transformation. ``update`` receives ``value=loss``.
      beta: how strongly the outputs are nudged towards the targets, above 0. Too large a beta with ``centred`` is not
        stable: the outputs are pushed away from the targets as strongly.
      centred: nudge both ways, and take half of the difference; otherwise the difference to the free phase.
      free_steps: of the free phase, from units of 0; ``Info.metrics["free_change"]`` is how far the unit that moves
        most would move in one more. A deep network needs hundreds.
      nudged_steps: of each nudged phase; a nudge goes down one layer in a step.
      step_size: epsilon, above 0, at most 1.
      input_scale: c, above 0. Units are between 0 and 1, and where too many of them are at these bounds the network
        hardly learns: that is so for normalised images, and not for pixels in [0, 1].
      placement: one sharding (:func:`fr_jax.placement` for K = 1, ``data_parallel`` devices); None is the default
        device.
      return_grads: also return the estimate in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics, for the outputs of the free phase.
      skip_nonfinite: where the estimate is not finite, the update of that mini-batch is dropped: weights and optimizer
        stay as they are. ``Info.metrics["skipped/1"]`` is then 1, else 0.

    Returns:
      The algorithm, for inputs ``(B, ...)`` of n_0 values each and targets ``(B, n_L)``, or labels ``(B,)`` that stand
      for 0 and 1. ``Info.loss`` is the mean of ||s_L - y||^2 / 2. ``state.params`` is a tuple of one, with an entry
      ``{"kernel", "bias"}`` for each layer. Without a hidden layer the gradient is the exact one, divided by
      1 + beta, or 1 - beta^2 if centred.

    Raises:
      ValueError: on sizes that are not two or more whole numbers, such as stages, a number or count out of range, a
        wrong number of optimizers or shardings; from ``init`` and ``step`` on a batch that does not fit.

    Example:
      >>> import fr_jax as fr, jax, jax.numpy as jnp, optax
      >>> fit = fr.equilibrium_propagation((3, 8, 2), optax.sgd(0.1))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.array([0, 1, 1, 0]))
      >>> state, info = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> fit.predict(state, batch.inputs).shape, sorted(info.metrics)
      ((4, 2), ['free_change', 'gradient_norm/1'])
    """
    sizes = check_sizes(layer_sizes, "equilibrium propagation")
    own = check_own(beta, centred, free_steps, nudged_steps, step_size, input_scale)
    network = dense_network(sizes, lambda x: jnp.clip(x, 0, 1))
    setup = check_setup(
        [network],
        squared_error,
        optimizer,
        placement,
        return_grads,
        donate,
        metrics_fn,
        skip_nonfinite=skip_nonfinite,
    )

    def apply(params: PyTree, model_state: PyTree, x: Array, /, **options: Any) -> tuple[Array, PyTree]:
        return free_phase(own, params, own.input_scale * x)[-1], model_state

    setup = dataclasses.replace(setup, stages=(setup.stages[0]._replace(apply=apply),))  # for predict
    return make_algorithm(setup, init, step, lambda: make_parts(setup, own))
