"""ADMM without gradients (Taylor, Burmeister, Xu, Singh, Patel, Goldstein 2016, arXiv:1605.02026), Algorithm 1.

A dense ReLU network with layers l = 1..L on all N examples at once, one per row; a_0 = x, h(z) = max(z, 0), ã = (a, 1),
W_l with the bias as its last row, W'_l without it. Outputs z_l and activations a_l are unknowns like the weights:

    minimise  l(z_L, y) + <z_L, lambda> + beta ||z_L - ã_{L-1} W_L||^2
              + sum_{l<L}  gamma ||a_l - h(z_l)||^2 + beta ||z_l - ã_{l-1} W_l||^2

Each update minimises that over one unknown, the others fixed. An iteration, for l = 1..L-1 and then L:

    weights      W_l = pinv(ã_{l-1}) z_l
    activations  a_l = (beta (z_{l+1} - b_{l+1}) W'_{l+1}^T + gamma h(z_l)) (beta W'_{l+1} W'_{l+1}^T + gamma I)^{-1}
    outputs      z_l = argmin_z  gamma (a_l - h(z))^2 + beta (z - m_l)^2,  m_l = ã_{l-1} W_l,  entry by entry
                 z_L = argmin_z  l(z, y) + lambda z + beta (z - m_L)^2
    multiplier   lambda <- lambda + beta (z_L - m_L),  after the warm start

with the paper's hinge loss for every output: l(z, 1) = max(1 - z, 0), l(z, 0) = max(z, 0). The paper has no biases. An
a_l is found before it is used: from one iteration to the next z, lambda and the weights are kept.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax._arrays import place
from fr_jax._placement import replicated
from fr_jax.algorithms._dense import affine, check_sizes, dense_network, goals
from fr_jax.algorithms._losses import combine, score
from fr_jax.algorithms._stages import KeyStream, init_stages, zeros
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._validation import BatchSpec, Setup, batch_size, check_count, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, MetricsFn, PyTree

__all__ = ["ADMMState", "admm"]


class Penalties(NamedTuple):
    """The checked arguments: beta, gamma, iterations without the multiplier, n_0..n_L."""

    beta: float
    gamma: float
    warm_start: int
    sizes: tuple[int, ...]


class ADMMState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`), of one stage, whose params have an entry per layer.

    Attributes:
      z: z_1..z_L, ``(N, n_l)``.
      multiplier: lambda, ``(N, n_L)``.
      inverse: of the Gram matrix of the inputs, which do not change, from the first step on.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    z: tuple[Array, ...]
    multiplier: Array
    inverse: Array
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    own: Penalties,
    setup: Setup,
    parts: ADMMParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> ADMMState:
    """Weights W^0 (of which the first iteration uses those of layers 2..L), Gaussian z, and lambda = 0."""
    if params is not None:
        raise ValueError("admm() solves for its weights and cannot start from given ones. Leave params out of init().")
    stages = init_stages(setup, key, batch, params, model_state)
    here, N = replicated(setup.shardings[0]), batch_size(batch)
    z, multiplier = parts.start(place(stages.key, here), N)
    smaller = min(N, own.sizes[0] + 1)
    inverse = zeros(jax.ShapeDtypeStruct((smaller, smaller), multiplier.dtype), here)
    return ADMMState(**stages.fields(), z=z, multiplier=multiplier, inverse=inverse)


product = functools.partial(jnp.matmul, precision="highest")


def with_ones(a: Array) -> Array:
    """ã: activations and the constant input of the biases."""
    return jnp.concatenate([a, jnp.ones((a.shape[0], 1), a.dtype)], axis=1)


def gram_inverse(extended: Array) -> Array:
    """The pseudoinverse of ã'ã, or of ã ã' if that is smaller."""
    gram = product(extended.T, extended) if _is_tall(extended) else product(extended, extended.T)
    # What of it is below its rounding errors, as from pixels that are always black, has no inverse.
    return jnp.linalg.pinv(gram, rtol=gram.shape[0] * jnp.finfo(gram.dtype).eps, hermitian=True)


def solve_weights(extended: Array, inverse: Array, z: Array) -> PyTree:
    """The least-squares solution of least norm of ã W = z, with the :func:`gram_inverse`."""
    tall = _is_tall(extended)
    W = product(inverse, product(extended.T, z)) if tall else product(extended.T, product(inverse, z))
    return {"kernel": W[:-1], "bias": W[-1]}


def _is_tall(extended: Array) -> bool:
    return extended.shape[0] >= extended.shape[1]


def solve_activations(own: Penalties, above: PyTree, z_above: Array, z: Array) -> Array:
    """The a_l that minimises gamma ||a - h(z_l)||^2 + beta ||z_{l+1} - a W' - b||^2, for the layer ``above``."""
    W = above["kernel"]
    matrix = own.beta * product(W, W.T) + own.gamma * jnp.eye(W.shape[0], dtype=W.dtype)
    right = own.beta * product(z_above - above["bias"][None], W.T) + own.gamma * jax.nn.relu(z)
    return jax.scipy.linalg.solve(matrix, right.T, assume_a="pos").T


def solve_outputs(own: Penalties, a: Array, m: Array) -> Array:
    """The z that minimises gamma (a - h(z))^2 + beta (z - m)^2, the better one of each side of 0."""
    off, on = jnp.minimum(m, 0), jnp.maximum((own.gamma * a + own.beta * m) / (own.gamma + own.beta), 0)
    cost = lambda z: own.gamma * (a - jax.nn.relu(z)) ** 2 + own.beta * (z - m) ** 2
    return jnp.where(cost(off) <= cost(on), off, on)


def solve_last_outputs(own: Penalties, y: Array, multiplier: Array, m: Array) -> Array:
    """The z that minimises l(z, y) + lambda z + beta (z - m)^2: convex, with a kink at 1 for y = 1, at 0 for y = 0."""
    # The minimum is at the kink unless it lies beyond it on one side, where the loss has slope -1 or 0, 0 or 1.
    slope = jnp.where(y > 0.5, -1.0, 0.0).astype(m.dtype)
    least = m - (multiplier + slope + 1) / (2 * own.beta)
    most = m - (multiplier + slope) / (2 * own.beta)
    return jnp.clip(jnp.where(y > 0.5, 1.0, 0.0).astype(m.dtype), least, most)


def hinge(z: Array, y: Array) -> Array:
    """The loss l of every output, ``(N, n_L)``."""
    return jax.nn.relu(jnp.where(y > 0.5, 1 - z, z))


def mean_hinge(outputs: Array, targets: Array) -> Array:
    """Its sum over the outputs, the mean over the examples."""
    return hinge(outputs, goals(targets, outputs)).sum() / outputs.shape[0]


class ADMMParts(NamedTuple):
    """The jitted functions: of ``init``, of the first iteration, and of every one."""

    start: Callable
    invert: Callable
    solve: Callable


def make_parts(setup: Setup, own: Penalties) -> ADMMParts:
    """``(key, N) -> (z, lambda)``; ``batch -> inverse``; an iteration: the new unknowns, what it reports, by name."""
    sharding, L = setup.shardings[0], len(own.sizes) - 1

    def start(key: Array, N: int) -> tuple[tuple[Array, ...], Array]:
        dtype = jnp.result_type(float)
        draw = lambda key, n: jax.random.normal(key, (N, n), dtype)
        return tuple(map(draw, jax.random.split(key, L), own.sizes[1:])), jnp.zeros((N, own.sizes[-1]), dtype)

    def ordered(batch: Batch) -> tuple[Array, Array]:
        order = None if batch.index is None else jnp.argsort(batch.index)
        x, targets = (rows if order is None else rows[order] for rows in batch[:2])
        return x.reshape(x.shape[0], -1).astype(jnp.result_type(float)), targets

    def invert(batch: Batch) -> Array:
        return gram_inverse(with_ones(ordered(batch)[0]))

    def solve(
        params: tuple, z: tuple, multiplier: Array, inverse: Array, stream: KeyStream, batch: Batch
    ) -> dict[str, Any]:
        x, targets = ordered(batch)
        W, outputs, inputs = list(params[0]), list(z), [x]  # of the layers: x, a_1, ..
        for i in range(L):
            extended = with_ones(inputs[i])
            W[i] = solve_weights(extended, inverse if i == 0 else gram_inverse(extended), outputs[i])
            if i < L - 1:
                inputs.append(solve_activations(own, W[i + 1], outputs[i + 1], outputs[i]))
                outputs[i] = solve_outputs(own, inputs[i + 1], affine(W[i], inputs[i]))
        y, m = goals(targets, outputs[-1]), affine(W[-1], inputs[-1])
        outputs[-1] = solve_last_outputs(own, y, multiplier, m)
        moved = multiplier + own.beta * (outputs[-1] - m)
        multiplier = jnp.where(stream.count < own.warm_start, multiplier, moved)
        predicted, _ = setup.stages[0].apply(tuple(W), ((),) * L, x)
        loss, _, metrics = combine([score(setup.loss_fn, setup.metrics_fn, predicted, targets)])
        return {
            "params": (tuple(W),),
            "z": tuple(outputs),
            "multiplier": multiplier,
            "count": stream.count + 1,
            "loss": loss,
            "metrics": metrics | lagrangian(own, W, outputs, inputs, multiplier, y),
        }

    here: Any = replicated(sharding)
    of_examples = {"z": sharding, "multiplier": sharding}
    of_network = dict.fromkeys(("params", "count", "loss", "metrics"), here)
    donated = ("params", "z", "multiplier") if setup.donate else ()
    return ADMMParts(
        jax.jit(start, static_argnames="N", out_shardings=sharding),
        jax.jit(invert, out_shardings=here),
        jax.jit(solve, donate_argnames=donated, out_shardings=of_network | of_examples),
    )


def lagrangian(
    own: Penalties, W: Sequence[PyTree], z: Sequence[Array], a: Sequence[Array], multiplier: Array, y: Array
) -> dict[str, Array]:
    """The terms of the augmented Lagrangian, means over the examples; ``a`` begins with the inputs."""
    mean = lambda values: jnp.sum(values) / y.shape[0]
    terms = {"output_loss": mean(hinge(z[-1], y)), "multiplier_term": mean(z[-1] * multiplier)}
    for i, (layer, out, below) in enumerate(zip(W, z, a, strict=True), start=1):
        terms[f"weight_error/{i}"] = own.beta * mean((out - affine(layer, below)) ** 2)
    for i, (out, activations) in enumerate(zip(z, a[1:], strict=False), start=1):
        terms[f"activation_error/{i}"] = own.gamma * mean((activations - jax.nn.relu(out)) ** 2)
    return terms


def step(setup: Setup, parts: ADMMParts, state: ADMMState, batch: Batch) -> tuple[ADMMState, Info]:
    """Iteration t, one jitted function; before the first, another."""
    now = Iteration(setup, state, batch, any_size=False)
    batch = now.send(batch, 0)
    inverse = parts.invert(batch) if now.t == 0 else state.inverse
    new = parts.solve(state.params, state.z, state.multiplier, inverse, state.streams[0], batch)
    now.params, now.loss, now.metrics = list(new["params"]), new["loss"], new["metrics"]
    now.streams[0] = now.streams[0]._replace(count=new["count"])
    state, info = now.finish(state, z=new["z"])
    return state._replace(multiplier=new["multiplier"], inverse=inverse), info


def admm(
    layer_sizes: Sequence[int],
    *,
    beta: float = 1.0,
    gamma: float = 10.0,
    warm_start: int = 10,
    placement: Sequence[Sharding] | None = None,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
) -> Algorithm:
    """Training without gradients by ADMM (Taylor et al. 2016): dense ReLU networks, all examples in every iteration.

    Each iteration solves for the weights, activations and outputs of every layer in closed form; it takes no gradient
    and has no learning rate. What it parallelises is the data: each of ``data_parallel`` devices has its rows of z and
    a, and only the products ã'ã and ã'z are added up over them.

    Args:
      layer_sizes: n_0..n_L, the values of an input, the units of each layer; the last are the outputs.
      beta: weight of ||z_l - ã_{l-1} W_l||^2, above 0.
      gamma: weight of ||a_l - h(z_l)||^2, above 0.
      warm_start: iterations before the first update of the multiplier. On MNIST the updates do harm, and a number above
        that of all iterations, which leaves them out, is better (``experiments/named-systems``).
      placement: one sharding (:func:`fr_jax.placement` for K = 1, ``data_parallel`` devices); None is the default
        device.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics, for the network's outputs with the new weights.

    Returns:
      The algorithm, for inputs ``(N, ...)`` of n_0 values each and targets ``(N, n_L)`` of 0 and 1, or labels ``(N,)``
      that stand for them. A state belongs to its N examples: every step has all of them, in the same order, or in any
      order with ``batch.index`` ``(N,)``, their places. ``Info.loss`` is the hinge loss of the network with its new
      weights, and ``Info.grads`` None. The metrics are the terms of the augmented Lagrangian, means over the examples:
      ``output_loss`` and ``multiplier_term``, ``weight_error/l`` times beta, ``activation_error/l`` times gamma.
      ``state.params`` is a tuple of one, with an entry ``{"kernel", "bias"}`` for each layer.

    Raises:
      ValueError: on sizes that are not two or more whole numbers, such as stages, a number or count out of range, a
        wrong number of shardings; from ``init`` on given weights; from both on a batch that does not fit.

    Example:
      >>> import fr_jax as fr, jax, jax.numpy as jnp
      >>> fit = fr.admm((3, 8, 2), warm_start=2)
      >>> batch = fr.Batch(jax.random.normal(jax.random.key(1), (6, 3)), jnp.array([0, 1, 1, 0, 0, 1]))
      >>> state, info = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> sorted(info.metrics)
      ['activation_error/1', 'multiplier_term', 'output_loss', 'weight_error/1', 'weight_error/2']
    """
    sizes = check_sizes(layer_sizes, "admm")
    given: dict[str, Any] = {"beta": beta, "gamma": gamma}
    for name, value in given.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
            raise ValueError(f"{name} = {value!r} was given; it must be a finite number above 0.")
    own = Penalties(float(beta), float(gamma), check_count("warm_start", warm_start, 0), sizes)
    network = dense_network(sizes, jax.nn.relu)
    setup = check_setup([network], mean_hinge, optax.identity(), placement, False, donate, metrics_fn)
    return make_algorithm(setup, functools.partial(init, own), step, lambda: make_parts(setup, own))
