"""The naive way to the gradient: the chain rule for every weight on its own, in O((E+V)²).

Source: papers/lecture-training-and-backprop.md, "A naive algorithm".
"""

from __future__ import annotations

import numpy as np

from fr_jax.reference.counting import Counter, Multiplications
from fr_jax.reference.network import RELU, Activation, Params, Trace, as_batch, check_one_example, forward, map_params

__all__ = ["loss_gradients", "output_gradients"]


def output_gradients(params: Params, trace: Trace, counter: Counter = None) -> Params:
    """∂ŷ/∂θ of one example, weight by weight; no result for one weight is used for another.

    For the edge w from node j of layer t to node i of layer t + 1, the derivative of every later node by w is carried
    forward through the graph: ∂u_i/∂w = z_j, then ∂z/∂w = σ'(u) ∂u/∂w and ∂u/∂w = W ∂z/∂w layer by layer, and
    ∂ŷ/∂w = αᵀ ∂z/∂w at the end. That takes O(E + V) multiplications per weight and O((E + V)²) for all. ∂ŷ/∂α = z^T
    and ∂ŷ/∂b = 1 take none.

    The counter counts the multiplications between the factors of the chain rule, after the forward pass. For the
    lecture's chain ŷ = a w_T ... w_1 x with the identity, ∂ŷ/∂w_i = (∂ŷ/∂z_T) (∂z_T/∂z_{T-1}) ... (∂z_i/∂w_i) has
    T - i + 2 factors and therefore T - i + 1 products, which the lecture calls its computation: T for w_1, 1 for w_T,
    and 1 + 2 + ... + T = T (T + 1) / 2 in all. A ReLU adds a product with σ' at each node on the way.

    Raises:
      ValueError: the trace is of a batch, not of one example.

    Example:
      >>> from fr_jax.reference.network import IDENTITY, chain
      >>> params, counter = chain([2.0, 3.0, 4.0], a=5.0), Multiplications()
      >>> grads = output_gradients(params, forward(params, np.array([1.0]), IDENTITY), counter)
      >>> [float(g[0, 0]) for g in grads.weights], counter.count
      ([60.0, 40.0, 30.0], 6)
    """
    check_one_example(trace)
    counter = Multiplications() if counter is None else counter
    grads = []
    for t, W in enumerate(params.weights):
        by_edge = [_edge_derivative(params, trace, t, i, j, counter) for i, j in np.ndindex(W.shape)]
        grads.append(np.array(by_edge, np.float64).reshape(W.shape))
    return Params(tuple(grads), trace.z[-1].copy(), 1.0)


def _edge_derivative(params: Params, trace: Trace, t: int, i: int, j: int, counter: Multiplications) -> np.ndarray:
    """∂ŷ/∂w for the edge from node j of layer t to node i of layer t + 1."""
    # The nodes of the current layer that depend on the edge: one, then all. Products for the others are not counted.
    reached = slice(i, i + 1)
    d_u = trace.z[t][j : j + 1]
    d_z = _through_activation(trace, t, reached, d_u, counter)
    for later in range(t + 1, len(params.weights)):
        d_u = counter.matmul(params.weights[later][:, reached], d_z)
        reached = slice(None)
        d_z = _through_activation(trace, later, reached, d_u, counter)
    return counter.matmul(params.alpha[reached], d_z)


def _through_activation(trace: Trace, t: int, reached: slice, d_u: np.ndarray, counter: Multiplications) -> np.ndarray:
    derivative = trace.activation.derivative
    return d_u if derivative is None else counter.times(derivative(trace.u[t][reached]), d_u)


def loss_gradients(
    params: Params, x: np.ndarray, y: np.ndarray | float, activation: Activation = RELU, counter: Counter = None
) -> Params:
    """∇_θ (1/B) Σ (ŷ - y)²: for each example 2 (ŷ - y) ∂ŷ/∂θ, averaged.

    x is ``(n_1,)`` or ``(B, n_1)``, y is ``()`` or ``(B,)``. The counter counts the forward pass, the chain rule, and
    the multiplications with 2 (ŷ - y).

    Raises:
      ValueError: x does not fit the first layer, y is not one number per example, or there is no example.

    Example:
      >>> from fr_jax.reference.network import IDENTITY, chain
      >>> g = loss_gradients(chain([2.0], a=3.0), np.array([1.0]), 5.0, IDENTITY)
      >>> g.weights, g.alpha, float(g.b)
      ((array([[6.]]),), array([4.]), 2.0)
    """
    counter = Multiplications() if counter is None else counter
    x, y = as_batch(params, x, y)
    examples = []
    for x_n, y_n in zip(x, y, strict=True):
        trace = forward(params, x_n, activation, counter)
        d_y_hat = 2 * (trace.y_hat - y_n) / len(x)
        grads = output_gradients(params, trace, counter)
        examples.append(map_params(lambda g, d=d_y_hat: counter.times(g, d), grads))
    return map_params(lambda *gs: sum(gs[1:], gs[0]), *examples)
