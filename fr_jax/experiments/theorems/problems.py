"""Two residual networks with a least-squares loss whose constants L and f(w*) are known.

Both have four layers and one mini-batch loss, and a weight vector w of all layers' weights:

    linear   h_l = h_{l-1} + e_r w_l' P_l x      z = r_4 = x'w      f(w) = 1/2N sum_i (x_i'w - y_i)^2
    sine     h_l = h_{l-1} + a sin(B_l h_{l-1} + w_l)               z = c'h_4,  f(w) = 1/2N sum_i (z_i - y_i)^2

The linear network carries x along and adds one part P_l x of it a layer. Its f is quadratic in all weights together:
L is the largest eigenvalue of H = 1/N sum x_i x_i', and w* solves H w* = 1/N sum x_i y_i. The sine network is not
convex. Each input occurs twice, with the targets of a network with weights w* plus and minus eta: so
f(w) = 1/2N sum_i (z_i(w) - z_i(w*))^2 + eta^2/2, and f(w*) = eta^2/2 is the least value. Its L and M are proved for all
w (:func:`sine_bounds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fr_jax.types import Array, Stage

__all__ = ["LAYERS", "PROBLEMS", "Problem", "linear_problem", "sine_bounds", "sine_problem"]

LAYERS = 4


class Problem(NamedTuple):
    """A least-squares network and its constants.

    Attributes:
      name: ``"linear"`` or ``"sine"``.
      inputs: ``(N, p)``.
      targets: ``(N,)``.
      start: ``(LAYERS, m)``, w^0.
      predict: ``(w (LAYERS, m), inputs (n, p)) -> (n,)``, the network as one formula.
      layers: ``replicas -> stages``: the same as layers for ``replicas`` networks side by side, inputs ``(B, replicas,
        p)`` and outputs ``(B, replicas)``. Nothing passes from one to another.
      lipschitz: L.
      optimum: f(w*).
      second_moment: M, proved for all w and any step size; None where there is no such bound.
    """

    name: str
    inputs: np.ndarray
    targets: np.ndarray
    start: np.ndarray
    predict: Callable[[Array, Array], Array]
    layers: Callable[[int], list[Stage]]
    lipschitz: float
    optimum: float
    second_moment: float | None

    def objective(self, w: Array) -> Array:
        """f(w): half the mean squared error over all examples."""
        return jnp.mean(jnp.square(self.predict(w, jnp.asarray(self.inputs)) - jnp.asarray(self.targets))) / 2


def loss_fn(z: Array, y: Array) -> Array:
    """Half the mean squared error of each replica's mini-batch, summed over replicas: ``(B, replicas) -> ()``."""
    return jnp.square(z - y).mean(0).sum() / 2


def linear_problem(
    examples: int = 64, part: int = 3, correlation: float = 0.5, noise: float = 0.5, seed: int = 0
) -> Problem:
    """The linear residual network; inputs are scaled so that L = 1.

    Args:
      examples: N.
      part: m, entries of x that a layer sees; x has ``4 m``.
      correlation: of any two entries of x; it is what couples the layers.
      noise: standard deviation of the targets about a linear function.
      seed: of the data.
    """
    rng = np.random.default_rng(seed)
    own, common = rng.standard_normal((examples, LAYERS * part)), rng.standard_normal((examples, 1))
    x = math.sqrt(1 - correlation) * own + math.sqrt(correlation) * common
    x /= np.sqrt(np.linalg.eigvalsh(x.T @ x / examples)[-1])
    truth = 2 * rng.standard_normal(LAYERS * part)
    y = x @ truth + noise * rng.standard_normal(examples)
    gram = x.T @ x / examples
    best = np.linalg.solve(gram, x.T @ y / examples)

    def layers(replicas: int) -> list[Stage]:
        def layer(number: int) -> Stage:
            mine = slice(number * part, (number + 1) * part)

            def init(key: Array, h: Any) -> tuple[Array, tuple]:
                return jnp.zeros((replicas, part)), ()

            def apply(params: Array, state: tuple, h: Any, **unused: Any) -> tuple[Any, tuple]:
                x, r = (h, 0.0) if number == 0 else h
                r = r + jnp.einsum("bsm,sm->bs", x[..., mine], params)
                return (r if number == LAYERS - 1 else (x, r)), state

            return Stage(init, apply)

        return [layer(number) for number in range(LAYERS)]

    return Problem(
        name="linear",
        inputs=x,
        targets=y,
        start=np.zeros((LAYERS, part)),
        predict=lambda w, x: x @ w.reshape(-1),
        layers=layers,
        lipschitz=float(np.linalg.eigvalsh(gram)[-1]),
        optimum=float(np.mean(np.square(x @ best - y)) / 2),
        second_moment=None,
    )


def sine_problem(
    pairs: int = 32, width: int = 4, amplitude: float = 0.5, gain: float = 0.5, noise: float = 0.3, seed: int = 0
) -> Problem:
    """The sine residual network: a = ``amplitude``, ``||B_l|| = gain``, ``||c|| = 1``, eta = ``noise``.

    Args:
      pairs: N / 2 inputs, each with two targets.
      width: m, of the features.
      amplitude: a.
      gain: the norm of each B_l, an orthogonal matrix times it.
      noise: eta.
      seed: of the data, the matrices, w* and w^0.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((pairs, width))
    matrices = [gain * np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(LAYERS)]
    c = rng.choice([-1.0, 1.0], width) / math.sqrt(width)
    best, start = rng.uniform(-1.5, 1.5, (2, LAYERS, width))

    def block(number: int, h: Array, w: Array) -> Array:
        return h + amplitude * jnp.sin(h @ jnp.asarray(matrices[number].T) + w)

    def predict(w: Array, h: Array) -> Array:
        for number in range(LAYERS):
            h = block(number, h, w[number][None])
        return h @ jnp.asarray(c)

    def layers(replicas: int) -> list[Stage]:
        def layer(number: int) -> Stage:
            def init(key: Array, h: Array) -> tuple[Array, tuple]:
                return jnp.broadcast_to(jnp.asarray(start[number])[None], (replicas, width)), ()

            def apply(params: Array, state: tuple, h: Array, **unused: Any) -> tuple[Array, tuple]:
                h = block(number, h, params[None])
                return (h @ jnp.asarray(c) if number == LAYERS - 1 else h), state

            return Stage(init, apply)

        return [layer(number) for number in range(LAYERS)]

    clean = np.asarray(predict(jnp.asarray(best), jnp.asarray(x)))
    lipschitz, second_moment = sine_bounds(amplitude, gain, float(np.abs(c).sum()), noise)
    return Problem(
        name="sine",
        inputs=np.concatenate([x, x]),
        targets=np.concatenate([clean + noise, clean - noise]),
        start=start,
        predict=predict,
        layers=layers,
        lipschitz=lipschitz,
        optimum=noise**2 / 2,
        second_moment=second_moment,
    )


def sine_bounds(amplitude: float, gain: float, c_sum: float, noise: float) -> tuple[float, float]:
    """L and M of the sine network, for all weights; ``||c||_2 = 1``.

    With a the amplitude and b the gain, layer l's output moves by at most rho = 1 + a b times its input, and by a times
    its own weights. So for a direction s = (s_1, .., s_4) in weight space the features of layer l move by at most
    u_l = rho u_{l-1} + a |s_l|; the second derivative along it is at most v_l = rho v_{l-1} + a (b u_{l-1} + |s_l|)^2.
    Hence ||dz/dw|| <= J with J^2 = a^2 sum_l rho^{2 (4-l)}, and |d2z| <= Q |s|^2 with Q the largest eigenvalue of the
    quadratic form v_4. Sines are at most 1, so |z - y| <= R = 8 a sum|c| + eta. With those,

        L = J^2 + R Q,      M = J^2 R^2.

    M bounds features replay's g too: each of its parts is a product of the same factors, taken at different weights.

    Returns:
      L, M.

    Example:
      >>> L, M = sine_bounds(0.5, 0.5, 2.0, 0.3)
      >>> round(L, 2), round(M, 1)
      (15.04, 151.9)
    """
    rho = 1 + amplitude * gain
    reach = np.zeros((LAYERS, LAYERS))  # row l: b u_{l-1} + |s_l| as a linear form of |s|
    for row in range(LAYERS):
        reach[row, row] = 1.0
        reach[row, :row] = [amplitude * gain * rho ** (row - 1 - column) for column in range(row)]
    # a rho^(4-l): J^2 is the sum of its squares, and v_4 the sum over l of it times (row l)^2.
    above = amplitude * rho ** np.arange(LAYERS - 1, -1, -1.0)
    J2 = float(np.square(above).sum())
    Q = float(np.linalg.eigvalsh(reach.T @ (above[:, None] * reach))[-1])
    R = 2 * LAYERS * amplitude * c_sum + noise
    return J2 + R * Q, J2 * R**2


PROBLEMS: dict[str, Callable[..., Problem]] = {"linear": linear_problem, "sine": sine_problem}
