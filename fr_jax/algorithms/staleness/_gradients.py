"""Remedies that change what an optimizer sees or makes: smaller gradients, fewer updates, smaller first updates."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fr_jax.algorithms._losses import wide
from fr_jax.algorithms._validation import Optimizers, check_count, per_stage
from fr_jax.algorithms.staleness._delays import mean_delay
from fr_jax.types import Array, PyTree

__all__ = [
    "AccumulateState",
    "RescheduledState",
    "accumulate",
    "accumulation",
    "check_optimizer",
    "has_updated",
    "rescheduled",
    "shrink_gradients",
]


def check_optimizer(optimizer: Any) -> None:
    """Raises ValueError for anything but one optax transformation."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"{optimizer!r} is not an optax transformation, such as optax.sgd(0.1). Wrap several one by one."
        )


def shrink_gradients(optimizer: Optimizers, factor: float, K: int) -> tuple[optax.GradientTransformation, ...]:
    """Gradient shrinking: stage k's optimizer sees beta^{K-k} g_k.

    In FDG (Zhuang, Wang, Liu, Lin, "Fully decoupled neural network learning using delayed gradients", IEEE TNNLS 2021,
    arXiv:1906.09108) a stage multiplies the delta that it receives by beta. The backward pass is linear in delta, so
    stage k's gradient is beta^{K-k} times the plain one. Here it is scaled where it enters the optimizer, before
    weight decay and momentum as in the authors' code; ``Info`` reports gradients and norms as they are before it.

    The authors' best beta is 0.2 to 0.8, with SGD and momentum at K = 2..4. Adam and its like divide the factor away.

    Args:
      optimizer: one optax transformation for all stages, or a sequence of K.
      factor: beta, 0 < beta <= 1; 1 returns the optimizers as they are.
      K: number of stages.

    Returns:
      K transformations, for a method's ``optimizer``.

    Raises:
      ValueError: the factor is outside (0, 1], K is not a positive whole number, or there are not K optimizers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fr_jax.algorithms import staleness
      >>> first, second = staleness.shrink_gradients(optax.sgd(1.0), 0.5, K=2)
      >>> [float(o.update(jnp.ones(()), o.init(jnp.ones(())))[0]) for o in (first, second)]
      [-0.5, -1.0]
    """
    check_count("K", K)
    if not isinstance(factor, numbers.Real) or not 0 < factor <= 1:
        raise ValueError(f"factor = {factor!r} was given; it must be above 0 and at most 1, which is no shrinking.")
    optimizers = per_stage(optimizer, K)
    shrink = lambda k: optax.scale(float(factor) ** (K - 1 - k))
    return tuple(o if factor == 1 or k == K - 1 else optax.chain(shrink(k), o) for k, o in enumerate(optimizers))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Period:
    """m, the mini-batches for one update (a pytree without leaves: it is the program's, not the checkpoint's)."""

    mini_batches: int


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`.

    Attributes:
      total: the sum of the gradients since the last update, in float32 or wider.
      count: int32 scalar, how many they are: 0 right after an update.
      period: m.
      inner_state: the optimizer's own state.
    """

    total: PyTree
    count: Array
    period: Period
    inner_state: PyTree


def accumulate(optimizer: optax.GradientTransformation, every: int) -> optax.GradientTransformation:
    """Accumulation: one update for every m mini-batches, with the mean of their gradients.

    ADL (Zhuang et al., "Accumulated decoupled learning", ICML 2021, arXiv:2012.03747): gradients are late by K-k
    mini-batches, but only by about (K-k)/m updates. With K = 1 and no batch normalisation, m mini-batches of B examples
    equal one of m B. The authors' code takes the sum; the mean keeps the learning rate that of a batch of m B. Each
    stage counts the gradients that it has had, so that all stages form the same groups of mini-batches.

    A learning-rate schedule inside ``optimizer`` counts updates: divide its boundaries by m. The state holds one more
    copy of the weights, and the optimizer's arithmetic is done for every mini-batch and dropped m-1 times out of m: a
    branch would wait for the device. ``optax.MultiSteps`` (0.2.8) takes a running mean, which rounds otherwise, in one
    dtype for all weights.

    Args:
      optimizer: any optax transformation.
      every: m, at least 1; 1 returns the optimizer as it is.

    Returns:
      A transformation with an :class:`AccumulateState`.

    Raises:
      ValueError: ``every`` is not a positive whole number, or the optimizer is not an optax transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fr_jax.algorithms import staleness
      >>> optimizer = staleness.accumulate(optax.sgd(1.0), every=2)
      >>> state = optimizer.init(jnp.ones(()))
      >>> updates, state = optimizer.update(jnp.array(1.0), state)
      >>> float(optimizer.update(jnp.array(3.0), state)[0])
      -2.0
    """
    check_count("every", every)
    check_optimizer(optimizer)
    if every == 1:
        return optimizer  # a state without sums, which is that of the plain method
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        zero = lambda p: jnp.zeros(p.shape, wide(p.dtype))
        count = jnp.zeros((), jnp.int32)
        return AccumulateState(jax.tree.map(zero, params), count, Period(int(every)), inner.init(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> Any:
        total = jax.tree.map(lambda total, g: total + g.astype(total.dtype), state.total, updates)
        mean = jax.tree.map(lambda total, g: (total / every).astype(g.dtype), total, updates)
        updates, inner_state = inner.update(mean, state.inner_state, params, **extra)
        full = state.count == every - 1
        choose = lambda new, old: jnp.where(full, new, old)
        state = AccumulateState(
            jax.tree.map(lambda total: choose(jnp.zeros_like(total), total), total),
            choose(jnp.zeros_like(state.count), state.count + 1),
            state.period,
            jax.tree.map(choose, inner_state, state.inner_state),
        )
        return jax.tree.map(lambda u: choose(u, jnp.zeros_like(u)), updates), state

    return type(optimizer)(init, update)  # whether it takes extra arguments, such as value=loss


def accumulation(opt_state: PyTree) -> AccumulateState | None:
    """The state of the optimizer's :func:`accumulate`, if it has one."""
    kinds = AccumulateState, optax.MultiStepsState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    found = [node for node in nodes if isinstance(node, kinds)]
    if not found:
        return None
    if len(found) > 1 or isinstance(found[0], optax.MultiStepsState) or accumulation(found[0].inner_state):
        raise ValueError(
            "the optimizer accumulates gradients several times over, or in an optax.MultiSteps; the remedy around it, "
            "such as weight_prediction, must know when an update comes. Use one fr_jax.staleness.accumulate."
        )
    return found[0]


def has_updated(opt_state: PyTree) -> Array | bool:
    """Whether the ``update`` that returned this state has moved the weights, and not put a gradient aside."""
    found = accumulation(opt_state)
    return True if found is None else found.count == 0


class RescheduledState(NamedTuple):
    """State of :func:`rescheduled`.

    Attributes:
      count: int32 scalar, j, the updates that the stage has made.
      inner_state: the optimizer's own state.
    """

    count: Array
    inner_state: PyTree


def rescheduled(
    optimizer: Optimizers, updates: int, K: int, microbatches: int = 1
) -> tuple[optax.GradientTransformation, ...]:
    """Learning-rate rescheduling: late stages start slowly, and are at the full rate after J updates.

    PipeMare's T1 (Yang et al., "PipeMare: asynchronous pipeline parallel DNN training", MLSys 2021, arXiv:1910.05124):

        eta_k = eta / tau_k^p,  p = 1 - min(j/J, 1),  tau_k = max(1, (K-k)/M)

    j = 0, 1, .. counts the stage's own updates. It is what the optimizer returns that is divided, so that this works
    for Adam too, and weight decay inside the optimizer is divided with the rest. Stages with tau_k = 1 are left alone.
    In joonkyoo/basis-rotation, which compares with T1, j starts at 1. (The paper itself was not at hand: the equation
    is that of other texts about it.)

    Args:
      optimizer: one optax transformation for all stages, or a sequence of K.
      updates: J, 0 or more; 0 returns the optimizers as they are.
      K: number of stages.
      microbatches: M, as for :func:`delay`.

    Returns:
      K transformations, for a method's ``optimizer``.

    Raises:
      ValueError: ``updates``, K or ``microbatches`` is not such a whole number, or there are not K optimizers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fr_jax.algorithms import staleness
      >>> first, *_ = staleness.rescheduled(optax.sgd(1.0), updates=2, K=5)
      >>> state, steps = first.init(jnp.ones(())), []
      >>> for _ in range(4):
      ...     u, state = first.update(jnp.ones(()), state)
      ...     steps.append(float(u))
      >>> steps
      [-0.25, -0.5, -1.0, -1.0]
    """
    check_count("updates", updates, least=0)
    taus, optimizers = mean_delay(K, microbatches), per_stage(optimizer, K)
    late = lambda tau: updates > 0 and tau > 1
    return tuple(_divide(o, tau, int(updates)) if late(tau) else o for o, tau in zip(optimizers, taus, strict=True))


def _divide(optimizer: optax.GradientTransformation, tau: float, J: int) -> optax.GradientTransformation:
    """The same optimizer, its updates divided by tau^p."""
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        inner_state = inner.init(params)
        accumulation(inner_state)  # refuses what it cannot count
        return RescheduledState(jnp.zeros((), jnp.int32), inner_state)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> Any:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        factor = tau ** (jnp.minimum(state.count / float(J), 1.0) - 1.0)  # exactly 1 from update J on
        updates = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        count = jnp.where(has_updated(inner_state), optax.safe_increment(state.count), state.count)
        return updates, RescheduledState(count, inner_state)

    return type(optimizer)(init, update)  # whether it takes extra arguments, such as value=loss
