"""How far a method's direction is from the gradient, stage by stage: Assumption 1 of Huo, Gu, Huang 2018.

With f the loss over many mini-batches, ∇f_k its gradient with respect to the weights of stage k at w^t, and g_k the
direction in which the method moves that stage at iteration t:

    σ_k      = <∇f_k, g_k> / ||∇f_k||²           eq. (8), figure 3
    cosine_k = <∇f_k, g_k> / (||∇f_k|| ||g_k||)
    ratio_k  = ||g_k|| / ||∇f_k||

σ = cosine · ratio. Back-propagation on all of f has 1, 1, 1; on one mini-batch the expectation of σ is 1, the cosine is
smaller and the ratio larger. The assumption is about the whole network: :func:`whole` combines the stages.

If ∇f is itself estimated from n mini-batches with gradients g^(i), the norm of their mean is too large by the noise of
the mean, and σ too small. :func:`sampled_gradient` takes the mean over all pairs of different mini-batches instead,

    ||∇f||² ≈ s = Σ_{i≠j} <g^(i), g^(j)> / n(n-1) = 2 Σ_i a_i / n(n-1),    a_i = <g^(i), g^(1) + ... + g^(i-1)>

which is unbiased, and may be negative. Without a gradient the a_i have mean zero and are uncorrelated (differences of a
martingale), so the sizes of a_i - (i-1) s give the standard error of s. An s below twice its error says nothing, nor do
the σ, cosine and ratio that divide by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax.algorithms.backprop import backprop
from fr_jax.types import Array, Batch, LossFn, PyTree, Stage

__all__ = ["Direction", "SampledGradient", "directions", "full_gradient", "sampled_gradient", "whole"]


class Direction(NamedTuple):
    """The direction of one stage, or of the whole network; device scalars until :meth:`read`.

    Attributes:
      product: <∇f_k, g_k>.
      gradient_square: ||∇f_k||², or an estimate of it, which may be negative.
      direction_norm: ||g_k||.
      square_noise: standard error of ``gradient_square`` because of sampling; 0 for a gradient that is not sampled, NaN
        for a sample of fewer than three mini-batches.
    """

    product: Array | float
    gradient_square: Array | float
    direction_norm: Array | float
    square_noise: Array | float = 0.0

    @property
    def stands_out(self) -> bool:
        """False if ``gradient_square`` is not above twice its noise: the numbers below mean nothing then."""
        # Not "square > 2 noise": an unknown noise (NaN) leaves the benefit of the doubt.
        return not float(self.gradient_square) <= 2 * float(self.square_noise)

    @property
    def gradient_norm(self) -> float:
        """||∇f_k||; NaN if the estimate of its square is negative. This and the numbers below wait for the device."""
        square = float(self.gradient_square)
        return math.sqrt(square) if square >= 0 else math.nan

    @property
    def sigma(self) -> float:
        """σ_k = <∇f_k, g_k> / ||∇f_k||²; NaN if the gradient is zero, or the estimate of its square negative."""
        norm = self.gradient_norm
        return _quotient(self.product, norm * norm)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between the two; NaN if one of them is zero."""
        return _quotient(self.product, self.gradient_norm * float(self.direction_norm))

    @property
    def norm_ratio(self) -> float:
        """||g_k|| / ||∇f_k||; NaN if the gradient is zero."""
        return _quotient(self.direction_norm, self.gradient_norm)

    def read(self) -> Direction:
        """The same as Python numbers; waits for the device."""
        return Direction(*map(float, self))


def _quotient(a: Array | float, b: float) -> float:
    return float(a) / b if b else math.nan


class SampledGradient(NamedTuple):
    """∇f estimated from mini-batches, stage by stage.

    ``mean``: K pytrees like ``state.params``; ``square``: K unbiased estimates of ||∇f_k||² (of a single mini-batch the
    square of its norm); ``square_noise``: their standard errors, NaN from fewer than three mini-batches.
    """

    mean: tuple[PyTree, ...]
    square: tuple[Array, ...]
    square_noise: tuple[Array, ...]


def full_gradient(
    stages: Sequence[Stage], loss_fn: LossFn, batch: Batch, *, placement: Sequence[Sharding] | None = None
) -> Callable[[Any, Iterable[Batch]], tuple[PyTree, ...]]:
    """Makes the function that computes ∇f at a state's weights, where f is the mean loss of given mini-batches.

    The network runs as in training: batch normalisation uses the statistics of each mini-batch, and dropout draws new
    masks. What the optimizer adds to a gradient (weight decay) is not in f. The state is only read.

    ``loss_fn`` and ``placement`` are as for ``fr_jax.backprop``; only the shapes of ``batch`` count.

    Returns:
      ``(state, batches) -> gradients``: from a state of any method for these stages, and one or more mini-batches of
      equal size, a tuple of K pytrees like ``state.params``, each on its stage's device. It does not wait for devices,
      holds the activations of one mini-batch and two gradients at a time, and raises a ValueError without batches.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, fr_jax as fr
      >>> stages, loss = [fr.from_linen(nn.Dense(1))], lambda y, z: jnp.mean((y - z) ** 2)
      >>> fit = fr.backprop(stages, loss, optax.sgd(0.001), return_grads=True)
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state = fit.init(jax.random.key(0), batch)
      >>> gradients = full_gradient(stages, loss, batch)(state, [batch])
      >>> _, info = fit.step(state, batch)
      >>> [round(one.sigma, 3) for one in directions(gradients, info.grads)]
      [1.0]
    """
    sampled = sampled_gradient(stages, loss_fn, batch, placement=placement)
    return lambda state, batches: sampled(state, batches).mean


def sampled_gradient(
    stages: Sequence[Stage], loss_fn: LossFn, batch: Batch, *, placement: Sequence[Sharding] | None = None
) -> Callable[[Any, Iterable[Batch]], SampledGradient]:
    """As :func:`full_gradient`, for mini-batches that are a sample of those whose mean is f; for :func:`directions`."""
    # Back-propagation whose optimizer does nothing: it runs on the placement of any method, and draws dropout anew.
    method = backprop(stages, loss_fn, optax.set_to_zero(), placement=placement, return_grads=True)
    blank = method.init(jax.random.key(0), batch)

    def gradients(state: Any, batches: Iterable[Batch]) -> SampledGradient:
        now = blank._replace(params=state.params, model_state=state.model_state)
        sums, products = [], []
        for one in batches:
            moved, info = method.step(now, one)
            now = now._replace(streams=moved.streams)  # and not its batch statistics: the state is only read
            assert info.grads is not None
            if not sums:
                sums, products = list(info.grads), [[] for _ in info.grads]
                continue
            for k, grads in enumerate(info.grads):
                sums[k], product = _add(sums[k], grads)
                products[k].append(product)
        if not sums:
            raise ValueError("the gradient over no mini-batches was asked for; give at least one.")
        return SampledGradient(*zip(*map(_mean, sums, products), strict=True))

    return gradients


@jax.jit
def _add(total: PyTree, grads: PyTree) -> tuple[PyTree, Array]:
    """The sum with one more gradient, and a_i, that gradient's product with the sum before."""
    product: Any = optax.tree.vdot(total, grads)
    return jax.tree.map(jnp.add, total, grads), product


@jax.jit
def _mean(total: PyTree, products: list[Array]) -> tuple[PyTree, Array, Array]:
    """The mean of n gradients, s and its standard error (see above), from their sum and n - 1 products."""
    n = len(products) + 1
    if n == 1:
        square: Any = optax.tree.norm(total, squared=True)
        return total, square, jnp.full_like(square, math.nan)
    a = jnp.stack(products)
    square = 2 * jnp.sum(a) / (n * (n - 1))
    residuals = a - jnp.arange(1, n, dtype=a.dtype) * square  # n - 1 of them, with n - 2 degrees of freedom
    freedom = (n - 1) / (n - 2) if n > 2 else math.nan
    noise = 2 * jnp.sqrt(freedom * jnp.sum(residuals**2)) / (n * (n - 1))
    return jax.tree.map(lambda x: x / n, total), square, noise


@jax.jit
def _direction(gradient: PyTree, square: Array | None, noise: Array | None, direction: PyTree | None) -> Direction:
    square = optax.tree.norm(gradient, squared=True) if square is None else square
    assert square is not None
    zero = jnp.zeros_like(square)
    noise = zero if noise is None else noise
    if direction is None:  # the stage does not update yet
        return Direction(zero, square, zero, noise)
    product: Any = optax.tree.vdot(gradient, direction)
    return Direction(product, square, optax.tree.norm(direction), noise)


def directions(gradients: Sequence[PyTree] | SampledGradient, grads: Sequence[PyTree]) -> tuple[Direction, ...]:
    """Compares the direction of every stage with its gradient, on the stage's device; nothing waits.

    Args:
      gradients: ∇f_k at w^t, from :func:`full_gradient` or :func:`sampled_gradient`.
      grads: g_k of iteration t: ``Info.grads`` of a method with ``return_grads=True``. A stage that does not update yet
        has σ = 0. With a sampled gradient, g_k must not belong to a mini-batch of the sample, or σ is too large.

    Raises:
      ValueError: their numbers differ, or ``grads`` is None.
    """
    nothing = (None,) * len(gradients)  # a gradient that is not sampled has no estimate of its square
    means, squares, noises = gradients if isinstance(gradients, SampledGradient) else (gradients, nothing, nothing)
    if grads is None or len(means) != len(grads):
        given = "None" if grads is None else len(grads)
        raise ValueError(
            f"{len(means)} gradients were given with {given} directions; give one per stage for both. Info.grads is "
            "None unless the method was made with return_grads=True."
        )
    return tuple(map(_direction, means, squares, noises, grads))


def whole(stages: Sequence[Direction]) -> Direction:
    """The direction of the whole network from those of its stages; waits for their devices.

    The noise of its square is that of independent stages.

    Example:
      >>> both = whole([Direction(9.0, 9.0, 6.0), Direction(16.0, 16.0, 8.0)])
      >>> both.sigma, both.cosine, both.norm_ratio
      (1.0, 0.5, 2.0)
    """
    products, squares, found, noises = zip(*(one.read() for one in stages), strict=True)
    return Direction(math.fsum(products), math.fsum(squares), math.hypot(*found), math.hypot(*noises))
