"""Back-propagation in matrix form, written by hand, in O(E+V).

Source: papers/lecture-training-and-backprop.md, "The backward pass".
"""

from __future__ import annotations

import numpy as np

from fr_jax.reference.counting import Counter, Multiplications
from fr_jax.reference.network import RELU, Activation, Params, Trace, as_batch, check_one_example, forward

__all__ = ["loss_gradients", "output_gradients"]


def output_gradients(params: Params, trace: Trace, counter: Counter = None) -> Params:
    """As :func:`fr_jax.reference.chain_rule.output_gradients`, layer by layer from ∂ŷ/∂z^T = α back to the first.

    For t = T-1, ..., 1:  ∂ŷ/∂u^{t+1} = ∂ŷ/∂z^{t+1} ⊙ σ'(u^{t+1}),  ∂ŷ/∂W^t = ∂ŷ/∂u^{t+1} (z^t)ᵀ,
    ∂ŷ/∂z^t = (W^t)ᵀ ∂ŷ/∂u^{t+1}. This takes at most two multiplications per edge and one per hidden node, after a
    forward pass of one per edge: O(E + V). The lecture's chain of T weights takes 2T - 1.

    Example:
      >>> from fr_jax.reference.network import IDENTITY, chain
      >>> params, counter = chain([2.0, 3.0, 4.0], a=5.0), Multiplications()
      >>> grads = output_gradients(params, forward(params, np.array([1.0]), IDENTITY), counter)
      >>> [float(g[0, 0]) for g in grads.weights], counter.count
      ([60.0, 40.0, 30.0], 5)
    """
    check_one_example(trace)
    counter = Multiplications() if counter is None else counter
    batch_of_one = trace._replace(z=tuple(z[None] for z in trace.z), u=tuple(u[None] for u in trace.u))
    return Params(_backward(params, batch_of_one, params.alpha[None], counter), trace.z[-1].copy(), 1.0)


def loss_gradients(
    params: Params, x: np.ndarray, y: np.ndarray | float, activation: Activation = RELU, counter: Counter = None
) -> Params:
    """As :func:`fr_jax.reference.chain_rule.loss_gradients`, by one forward and one backward pass over a whole batch.

    The backward pass starts with ∂ℓ/∂ŷ = 2 (ŷ - y) / B and ∂ℓ/∂z^T = ∂ℓ/∂ŷ αᵀ, one row per example. The counter
    counts the multiplications of both passes.
    """
    counter = Multiplications() if counter is None else counter
    x, y = as_batch(params, x, y)
    trace = forward(params, x, activation, counter)
    d_y_hat = 2 * (trace.y_hat - y) / len(x)
    weights = _backward(params, trace, counter.times(d_y_hat[:, None], params.alpha), counter)
    return Params(weights, counter.matmul(d_y_hat, trace.z[-1]), d_y_hat.sum())


def _backward(params: Params, trace: Trace, d_z: np.ndarray, counter: Multiplications) -> tuple[np.ndarray, ...]:
    """From ``d_z`` ``(B, n_T)``, the derivative by z^T, to the derivatives by every W^t."""
    derivative = trace.activation.derivative
    grads = []
    for t in reversed(range(len(params.weights))):
        # σ' = 1 is not a product in the lecture's count, so the identity must not multiply by it.
        d_u = d_z if derivative is None else counter.times(d_z, derivative(trace.u[t]))
        grads.append(counter.matmul(d_u.T, trace.z[t]))
        if t > 0:  # nothing needs the derivative by x
            d_z = counter.matmul(d_u, params.weights[t])
    return tuple(reversed(grads))
