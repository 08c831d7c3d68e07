"""How far a method's direction is from the gradient, module by module: Assumption 1 of Huo, Gu, Huang 2018.

With f the loss over many mini-batches, ∇f_k its gradient with respect to module k's weights at w^t, and g_k the
direction in which the method moves that module at iteration t:

    σ_k      = <∇f_k, g_k> / ||∇f_k||²           eq. (8), figure 3
    cosine_k = <∇f_k, g_k> / (||∇f_k|| ||g_k||)
    ratio_k  = ||g_k|| / ||∇f_k||

σ = cosine · ratio. Back-propagation on all of f has 1, 1, 1; on one mini-batch σ is 1 in the mean, the cosine is
smaller and the ratio larger. The assumption is about the whole network: :func:`whole` adds the modules up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Sharding

from fr_jax.algorithms.backprop import backprop
from fr_jax.algorithms.steps import LossFn
from fr_jax.types import Array, Batch, PyTree, Stage

__all__ = ["Direction", "directions", "full_gradient", "whole"]


class Direction(NamedTuple):
    """Of one module, or of the whole network; device scalars until :meth:`read`.

    Attributes:
      product: <∇f_k, g_k>.
      gradient_norm: ||∇f_k||.
      direction_norm: ||g_k||.
    """

    product: Array | float
    gradient_norm: Array | float
    direction_norm: Array | float

    @property
    def sigma(self) -> Array | float:
        """σ_k = <∇f_k, g_k> / ||∇f_k||²; NaN where the gradient is zero."""
        return _quotient(self.product, self.gradient_norm * self.gradient_norm)

    @property
    def cosine(self) -> Array | float:
        """Of the angle between the two; NaN where one of them is zero."""
        return _quotient(self.product, self.gradient_norm * self.direction_norm)

    @property
    def norm_ratio(self) -> Array | float:
        """||g_k|| / ||∇f_k||; NaN where the gradient is zero."""
        return _quotient(self.direction_norm, self.gradient_norm)

    def read(self) -> Direction:
        """The same as Python numbers; waits for the device."""
        return Direction(*map(float, self))


def _quotient(a: Array | float, b: Array | float) -> Array | float:
    if isinstance(b, float):
        return a / b if b else math.nan
    return a / b


def full_gradient(
    stages: Sequence[Stage], loss_fn: LossFn, batch: Batch, *, placement: Sequence[Sharding] | None = None
) -> Callable[[Any, Iterable[Batch]], tuple[PyTree, ...]]:
    """Makes the function that computes ∇f at a state's weights, where f is the mean loss of given mini-batches.

    The network runs as in training: batch normalisation uses each mini-batch's own statistics, dropout draws masks of
    its own. What the optimizer adds to a gradient (weight decay) is not in f. The state is only read.

    Args:
      stages: the K modules.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      batch: a mini-batch; only its shapes count.
      placement: one sharding a module; None puts all on the default device.

    Returns:
      ``(state, batches) -> gradients``: a state of any method of these stages, and one or more mini-batches of equal
      size; a tuple of K pytrees like ``state.params``, each on its module's device. Nothing waits for the devices. It
      holds the activations of one mini-batch, and two gradients, at a time. It raises a ValueError without batches.

    Raises:
      ValueError: a wrong number of stages or shardings.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> loss = lambda y, z: jnp.mean((y - z) ** 2)
      >>> fit = fr.features_replay(stages, loss, optax.sgd(0.001), return_grads=True)
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state, _ = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> gradients = full_gradient(stages, loss, batch)(state, [batch])
      >>> _, info = fit.step(state, batch)
      >>> [0.9 < one.read().sigma < 1.1 for one in directions(gradients, info.grads)]
      [True, True]
    """
    method = backprop(stages, loss_fn, optax.set_to_zero(), placement=placement, return_grads=True)
    blank = method.init(jax.random.key(0), batch)

    def gradients(state: Any, batches: Iterable[Batch]) -> tuple[PyTree, ...]:
        total, count = (), 0
        now = blank._replace(params=state.params, model_state=state.model_state)
        for one in batches:
            moved, info = method.step(now, one)
            now = now._replace(streams=moved.streams)
            assert info.grads is not None
            total = tuple(map(_add, total, info.grads)) if total else info.grads
            count += 1
        if not count:
            raise ValueError("the gradient over no mini-batches was asked for; give at least one.")
        return tuple(_divide(one, count) for one in total)

    return gradients


@jax.jit
def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + y, a, b)


@jax.jit
def _divide(a: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: x / count, a)


@jax.jit
def _direction(gradient: PyTree, direction: PyTree | None) -> Direction:
    norm: Any = optax.tree.norm(gradient)
    if direction is None:
        return Direction(0 * norm, norm, 0 * norm)
    product: Any = optax.tree.vdot(gradient, direction)
    return Direction(product, norm, optax.tree.norm(direction))


def directions(gradients: Sequence[PyTree], grads: Sequence[PyTree]) -> tuple[Direction, ...]:
    """Compares the direction of every module with its gradient, on the module's device; nothing waits.

    Args:
      gradients: ∇f_k at w^t, from :func:`full_gradient`.
      grads: g_k of iteration t, which is ``Info.grads`` of a method with ``return_grads=True``. A module that does not
        update yet has None there, and σ = 0.

    Raises:
      ValueError: their numbers differ, or ``grads`` is None.
    """
    if grads is None or len(gradients) != len(grads):
        given = "None" if grads is None else len(grads)
        raise ValueError(
            f"{len(gradients)} gradients were given with {given} directions; give as many, one a module. Info.grads is "
            "None unless the method was made with return_grads=True."
        )
    return tuple(map(_direction, gradients, grads))


def whole(modules: Sequence[Direction]) -> Direction:
    """The whole network's direction from its modules'; reads them, and so waits for their devices.

    Example:
      >>> both = whole([Direction(9.0, 3.0, 6.0), Direction(16.0, 4.0, 8.0)])
      >>> both.sigma, both.cosine, both.norm_ratio
      (1.0, 0.5, 2.0)
    """
    products, gradients, found = zip(*(one.read() for one in modules), strict=True)
    return Direction(math.fsum(products), math.hypot(*gradients), math.hypot(*found))
