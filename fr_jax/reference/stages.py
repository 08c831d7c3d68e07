"""Stages, a loss and an update with hand-written gradients for the loops of ``decoupled``.

The weights of a stage are one pair ``(W, b)`` per layer: ``W`` is ``(n_out, n_in)``, ``b`` is ``(n_out,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

__all__ = ["init_layers", "mean_squared_error", "relu_stage", "sgd_update"]

Layers: TypeAlias = tuple[tuple[np.ndarray, np.ndarray], ...]


def init_layers(rng: np.random.Generator, widths: Sequence[int]) -> Layers:
    """Random layers: W ~ N(0, 2 / n_in) (He et al. 2015, equation 10), b = 0.

    ``widths`` are ``(n_0, ..., n_L)``: inputs, then the nodes of each of L layers. Slices of the L float64 pairs
    ``(W, b)`` are the weights of stages.

    Raises:
      ValueError: there are fewer than two widths, or one below 1.

    Example:
      >>> layers = init_layers(np.random.default_rng(0), (3, 5, 4, 2))
      >>> w = [layers[:2], layers[2:]]
      >>> [[W.shape for W, b in stage] for stage in w]
      [[(5, 3), (4, 5)], [(2, 4)]]
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths {tuple(widths)} make no layer: give two or more, each 1 or more.")
    pairs = zip(widths, widths[1:], strict=False)
    return tuple((rng.standard_normal((n, m)) * np.sqrt(2 / m), np.zeros(n)) for m, n in pairs)


def relu_stage(layers: int, *, linear_output: bool = False) -> Callable:
    """A stage of so many dense layers: z ← ReLU(W z + b), the last one without ReLU if ``linear_output``.

    Returns:
      ``stage(w, h, s) -> (y, pull)``: h ``(B, n_in)``, y ``(B, n_out)``; the mini-batch's number s is not used.
      ``pull(dy)`` applies, layer by layer from the last, du = dz ⊙ σ'(u), dW = duᵀ z, db = Σ du, dz = du W, and returns
      ``(((dW, db), ...), dh)``.

    Raises:
      ValueError: ``layers`` is below 1; from the stage, weights of another number of layers.

    Example:
      >>> stage = relu_stage(1)
      >>> y, pull = stage(((np.array([[1.0, -1.0]]), np.zeros(1)),), np.array([[3.0, 1.0]]), 0)
      >>> y, pull(np.ones((1, 1)))
      (array([[2.]]), (((array([[3., 1.]]), array([1.])),), array([[ 1., -1.]])))
    """
    if layers < 1:
        raise ValueError(f"a stage of {layers} layers: give 1 or more.")

    def stage(w: Layers, h: np.ndarray, s: int) -> tuple[np.ndarray, Callable]:
        if len(w) != layers:
            raise ValueError(f"weights of {len(w)} layers for a stage of {layers}.")
        z, slopes = [h], []
        for j, (W, b) in enumerate(w):
            u = z[-1] @ W.T + b
            linear = linear_output and j == layers - 1
            z.append(u if linear else np.maximum(u, 0.0))
            # The derivative at u = 0 is 0, as in jax.nn.relu, with which the tests compare it.
            slopes.append(np.ones_like(u) if linear else (u > 0).astype(u.dtype))

        def pull(dy: np.ndarray) -> tuple[Layers, np.ndarray]:
            dz, grads = dy, []
            for j in reversed(range(layers)):
                du = dz * slopes[j]
                grads.append((du.T @ z[j], du.sum(0)))
                dz = du @ w[j][0]
            return tuple(reversed(grads)), dz

        return z[-1], pull

    return stage


def mean_squared_error(outputs: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """(1/B) Σ ‖outputs - targets‖²: the mean over the batch of the sum over features, and its gradient by the outputs.

    Outputs, targets and gradient are ``(B, n)``.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> mean_squared_error(np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]]))
      (5.0, array([[2., 4.]]))
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs of shape {outputs.shape} and targets of shape {targets.shape}: they must be equal.")
    difference = outputs - targets
    return float((difference**2).sum() / len(outputs)), 2 * difference / len(outputs)


def sgd_update(learning_rate: float) -> Callable[[Any, Any], Any]:
    """Stochastic gradient descent, w ← w - γ g, for any nesting of tuples, lists and dictionaries of arrays.

    Example:
      >>> sgd_update(0.1)({"a": (np.array([1.0]),)}, {"a": (np.array([10.0]),)})
      {'a': (array([0.]),)}
    """

    def update(w: Any, g: Any) -> Any:
        if isinstance(w, Mapping):
            return {name: update(w[name], g[name]) for name in w}
        if isinstance(w, tuple | list):  # a NamedTuple takes its fields one by one
            items = [update(*pair) for pair in zip(w, g, strict=True)]
            return type(w)(*items) if hasattr(w, "_fields") else type(w)(items)
        return w - learning_rate * g

    return update
