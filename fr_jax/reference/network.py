"""The lecture's network: ``z¹ = x``, ``z^{t+1} = ReLU(W^t z^t)``, ``ŷ = αᵀ z^T + b``, loss ``(ŷ - y)²``.

Source: papers/lecture-training-and-backprop.md. In code t counts from 0: ``z[0]`` is the input, and ``weights[t]`` goes
from layer t to layer t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fr_jax.reference.counting import Multiplications


class Activation(NamedTuple):
    """A function σ of one number, applied to each node.

    Attributes:
      value: ``u -> σ(u)``, element by element.
      derivative: ``u -> σ'(u)``, element by element; None if σ' = 1 everywhere: then no method multiplies by it.
    """

    value: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray], np.ndarray] | None


RELU = Activation(lambda u: np.maximum(u, 0.0), lambda u: (u > 0).astype(np.float64))
"""max(u, 0); its derivative at 0 is taken as 0, as ``jax.nn.relu`` does."""

IDENTITY = Activation(lambda u: u, None)
"""The transformation of the lecture's one-dimensional chain."""


class Params(NamedTuple):
    """The trained numbers θ of the network, or a gradient with respect to them.

    Attributes:
      weights: T - 1 matrices; ``weights[t]`` is ``(n_{t+1}, n_t)``, entry ``[i, j]`` is the edge from node j to node i.
      alpha: ``(n_T,)``, the output's weights.
      b: ``()``, the output's bias.
    """

    weights: tuple[np.ndarray, ...]
    alpha: np.ndarray
    b: Any


class Trace(NamedTuple):
    """What a forward pass stores: the input and the output of every node, for one example or a batch.

    Attributes:
      z: T arrays ``(n_t,)`` or ``(B, n_t)``, the layers' outputs; ``z[0]`` is x.
      u: T - 1 arrays; ``u[t] = W^t z[t]`` goes into the nodes of layer t + 1.
      y_hat: ``()`` or ``(B,)``, the prediction.
      activation: what was applied to u.
    """

    z: tuple[np.ndarray, ...]
    u: tuple[np.ndarray, ...]
    y_hat: np.ndarray
    activation: Activation


def init(rng: np.random.Generator, widths: Sequence[int]) -> Params:
    """Random float64 weights: W^t ~ N(0, 2 / n_t) (He et al. 2015, equation 10), α ~ N(0, 1 / n_T), b = 0.

    ``widths`` are ``(n_1, ..., n_T)``, the nodes of the input and of each hidden layer.

    Raises:
      ValueError: there is no width, or one below 1.

    Example:
      >>> params = init(np.random.default_rng(0), (3, 5, 4))
      >>> [W.shape for W in params.weights], params.alpha.shape, params.b
      ([(5, 3), (4, 5)], (4,), 0.0)
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"widths {tuple(widths)} make no network: give at least one width, each 1 or more.")
    weights = (rng.standard_normal((n, m)) * np.sqrt(2 / m) for m, n in zip(widths, widths[1:], strict=False))
    return Params(tuple(weights), rng.standard_normal(widths[-1]) / np.sqrt(widths[-1]), 0.0)


def chain(weights: Sequence[float] | np.ndarray, a: float) -> Params:
    """The lecture's one-dimensional chain ŷ = a w_T ... w_2 w_1 x; run it with ``activation=IDENTITY``.

    Example:
      >>> float(forward(chain([2.0, 3.0], a=5.0), np.array([7.0]), IDENTITY).y_hat)
      210.0
    """
    return Params(tuple(np.full((1, 1), w, np.float64) for w in weights), np.full(1, a, np.float64), 0.0)


def size(params: Params) -> tuple[int, int]:
    """``(E, V)``: edges of the graph (entries of all W^t and α, without b) and its nodes (x, hidden nodes, ŷ).

    Example:
      >>> size(init(np.random.default_rng(0), (3, 5, 4)))
      (39, 13)
    """
    inputs = sum(W.shape[1] for W in params.weights)
    return sum(W.size for W in params.weights) + params.alpha.size, inputs + params.alpha.size + 1


def forward(
    params: Params, x: np.ndarray, activation: Activation = RELU, counter: Multiplications | None = None
) -> Trace:
    """The forward pass, storing every u and z: z¹ = x, u^{t+1} = W^t z^t, z^{t+1} = σ(u^{t+1}), ŷ = αᵀ z^T + b.

    It takes one multiplication per edge and example. ``x`` is ``(n_1,)``, one example, or ``(B, n_1)``, a batch.

    Raises:
      ValueError: x does not fit the first layer.

    Example:
      >>> params = Params((np.array([[1.0, -1.0], [0.5, 0.5]]),), np.array([1.0, 2.0]), 0.5)
      >>> trace = forward(params, np.array([1.0, 3.0]))
      >>> trace.u[0], trace.z[1], float(trace.y_hat)
      (array([-2.,  2.]), array([0., 2.]), 4.5)
    """
    counter = Multiplications() if counter is None else counter
    z, u = [_inputs(params, x)], []
    for W in params.weights:
        u.append(counter.matmul(z[-1], W.T))  # W z of one example, or of each row of a batch
        z.append(activation.value(u[-1]))
    return Trace(tuple(z), tuple(u), counter.matmul(z[-1], params.alpha) + params.b, activation)


def loss(params: Params, x: np.ndarray, y: np.ndarray | float, activation: Activation = RELU) -> float:
    """The square loss (ŷ - y)², its mean over a batch: x is ``(n_1,)`` or ``(B, n_1)``, y is ``()`` or ``(B,)``.

    Raises:
      ValueError: x does not fit the first layer, y is not one number per example, or there is no example.

    Example:
      >>> loss(chain([2.0, 3.0], a=1.0), np.array([[1.0], [2.0]]), np.array([5.0, 10.0]), IDENTITY)
      2.5
    """
    x, y = as_batch(params, x, y)
    return float(np.mean((forward(params, x, activation).y_hat - y) ** 2))


def as_batch(params: Params, x: np.ndarray, y: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """``(x, y)`` as float64 arrays ``(B, n_1)`` and ``(B,)``; one example ``(n_1,)``, ``()`` becomes a batch of one."""
    x, y = _inputs(params, x), np.asarray(y, np.float64)
    if y.shape != x.shape[:-1]:
        raise ValueError(f"y of shape {y.shape} for x of shape {x.shape}: give one target per example, {x.shape[:-1]}.")
    return np.atleast_2d(x), np.atleast_1d(y)


def _inputs(params: Params, x: np.ndarray) -> np.ndarray:
    # Without a hidden layer (T = 1) the output's weights tell the number of inputs.
    x, n = np.asarray(x, np.float64), (*params.weights, params.alpha[None])[0].shape[1]
    if x.ndim not in (1, 2) or x.shape[-1] != n or len(x) == 0:
        raise ValueError(f"x of shape {x.shape} does not fit a network of {n} inputs: give ({n},) or (B, {n}), B >= 1.")
    return x


def check_one_example(trace: Trace) -> None:
    """Raises ValueError if the trace is of a batch."""
    if trace.z[0].ndim != 1:
        raise ValueError(f"the trace is of {len(trace.z[0])} examples: give the forward pass of one, with x (n,).")


def map_params(function: Callable, *params: Params) -> Params:
    """Applies a function to corresponding arrays of one or several parameter sets, such as θ and a gradient."""
    weights = tuple(function(*matrices) for matrices in zip(*(p.weights for p in params), strict=True))
    return Params(weights, function(*(p.alpha for p in params)), function(*(p.b for p in params)))
