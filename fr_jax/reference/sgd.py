"""Mini-batch stochastic gradient descent, as the lecture writes it.

Source: papers/lecture-training-and-backprop.md, "Training neural network via SGD".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fr_jax.reference import backpropagation
from fr_jax.reference.network import Params, as_batch, forward, map_params

__all__ = ["train"]


def train(
    params: Params,
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    rng: np.random.Generator,
    gradients: Callable[[Params, np.ndarray, np.ndarray], Params] = backpropagation.loss_gradients,
) -> tuple[Params, np.ndarray]:
    """Trains the ReLU network on the square loss.

    In each epoch the data are shuffled and split into n / B mini-batches D_i of B examples; for each,
    g = (1/B) Σ_{(x, y) ∈ D_i} ∇_θ (ŷ - y)² and θ ← θ - η g.

    Args:
      params: θ at the start.
      x: ``(n, n_1)``, the data.
      y: ``(n,)``, the targets.
      epochs: passes over the data.
      batch_size: B, a divisor of n.
      learning_rate: η.
      rng: shuffles the data.
      gradients: ``(params, x, y) -> g``; ``chain_rule.loss_gradients`` gives the same result, more slowly.

    Returns:
      θ at the end, and ``(epochs,)``, the mean square loss over all data after each epoch.

    Raises:
      ValueError: B does not divide n, or the data do not fit the network.

    Example:
      >>> from fr_jax.reference.network import init
      >>> rng = np.random.default_rng(0)
      >>> x = rng.uniform(-1, 1, (64, 2))
      >>> settings = {"epochs": 20, "batch_size": 8, "learning_rate": 0.05}
      >>> params, losses = train(init(rng, (2, 8)), x, np.abs(x[:, 0]), rng=rng, **settings)
      >>> bool(losses[-1] < 0.1 * np.var(x[:, 0]))
      True
    """
    x, y = as_batch(params, x, y)
    n = len(x)
    if batch_size < 1 or n % batch_size:
        raise ValueError(f"{n} examples cannot be split into batches of {batch_size}: choose a divisor of {n}.")
    losses = np.empty(epochs)
    for epoch in range(epochs):
        for batch in rng.permutation(n).reshape(-1, batch_size):
            # n / B whole mini-batches: B divides n, so that every example counts equally.
            g = gradients(params, x[batch], y[batch])
            params = map_params(lambda theta, g: theta - learning_rate * g, params, g)
        losses[epoch] = np.mean((forward(params, x).y_hat - y) ** 2)
    return params, losses
