"""Remedies against stale gradients: shrink them, make fewer updates, or play with the weights of the replay.

Stage k of K uses at iteration t the gradient of mini-batch s = t+k-K, after K-k updates of its own. Each remedy is
independent of the others and of the optimizer, and has a value that gives back the plain method:

    shrink_gradients   beta^{K-k} g_k                              1   FDG, Zhuang et al. 2021
    accumulate         the mean of m gradients, one update         1   ADL, Zhuang et al. 2021
    weight_prediction  play with w_k + (K-k) (last update of w_k)  0   SpecTrain, Chen, Yang, Cheng 2018

The first two wrap what is passed to a method as its optimizer; the third is an option of the method.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fr_jax.algorithms._losses import wide
from fr_jax.algorithms._validation import Optimizers, check_count, per_stage
from fr_jax.types import Array, PyTree

__all__ = ["AccumulateState", "RememberUpdateState", "accumulate", "predicted", "remember_update", "shrink_gradients"]


def _check_optimizer(optimizer: Any) -> None:
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
    _check_optimizer(optimizer)
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


class RememberUpdateState(NamedTuple):
    """State of :func:`remember_update`.

    Attributes:
      last_update: what was last added to the weights, shaped like them; zeros before the first update.
      inner_state: the optimizer's own state.
    """

    last_update: PyTree
    inner_state: PyTree


def _accumulation(opt_state: PyTree) -> AccumulateState | None:
    """The state of the optimizer's :func:`accumulate`, if it has one."""
    kinds = AccumulateState, optax.MultiStepsState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    found = [node for node in nodes if isinstance(node, kinds)]
    if not found:
        return None
    if len(found) > 1 or isinstance(found[0], optax.MultiStepsState) or _accumulation(found[0].inner_state):
        raise ValueError(
            "the optimizer accumulates gradients several times over, or in an optax.MultiSteps; weight prediction must "
            "know when the next update comes. Use one fr_jax.staleness.accumulate, or weight_prediction=0."
        )
    return found[0]


def remember_update(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, with its last update in its state, for :func:`predicted`.

    Costs a copy of the weights. Under :func:`accumulate` it is the last that was not skipped. Methods with a
    ``weight_prediction`` wrap their optimizers themselves.

    Args:
      optimizer: any optax transformation.

    Returns:
      A transformation with a :class:`RememberUpdateState`.

    Raises:
      ValueError: the optimizer is not an optax transformation; from its ``init``, if it accumulates otherwise than by
        one :func:`accumulate`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fr_jax.algorithms import staleness
      >>> optimizer = staleness.remember_update(optax.sgd(0.5))
      >>> _, state = optimizer.update(jnp.array(1.0), optimizer.init(jnp.array(3.0)))
      >>> float(state.last_update)
      -0.5
    """
    _check_optimizer(optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        inner_state = inner.init(params)
        _accumulation(inner_state)
        return RememberUpdateState(jax.tree.map(jnp.zeros_like, params), inner_state)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> Any:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        accumulation = _accumulation(inner_state)
        # The old update is read in every case: XLA is not given the buffer of an argument that nothing reads.
        moved = True if accumulation is None else accumulation.count == 0
        choose = lambda u, old: jnp.where(moved, u.astype(old.dtype), old)
        last = jax.tree.map(choose, updates, state.last_update)
        return updates, RememberUpdateState(last, inner_state)

    return type(optimizer)(init, update)  # whether it takes extra arguments, such as value=loss


def predicted(params: PyTree, opt_state: RememberUpdateState, horizon: int, strength: float = 1.0) -> PyTree:
    """The weights expected ``horizon`` mini-batches from now: w + strength n u, with u the last update.

    n is the number of updates until then: ``horizon``, under :func:`accumulate` floor((count + horizon) / m).

    SpecTrain (Chen, Yang, Cheng, "Efficient and robust parallel DNN training through model parallelism on multi-GPU
    platform", arXiv:1809.02839) predicts w - s eta v, with v the momentum and s the updates to come: for SGD with
    momentum, u = -eta v. For other optimizers compare PipeOptim (Guan et al., arXiv:2312.00839).

    Args:
      params: w.
      opt_state: state of a :func:`remember_update`, the outermost wrapper.
      horizon: mini-batches to look ahead, 0 or more.
      strength: 1 goes all the way, 0 stays at w.

    Returns:
      New arrays like ``params``.

    Raises:
      ValueError: ``opt_state`` is not that of :func:`remember_update`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fr_jax.algorithms import staleness
      >>> state = staleness.RememberUpdateState(jnp.array(-0.5), inner_state=())
      >>> float(staleness.predicted(jnp.array(3.0), state, horizon=2))
      2.0
    """
    if not isinstance(opt_state, RememberUpdateState):
        raise ValueError(
            f"predicted() was given an opt_state of type {type(opt_state).__name__}, without a last update. Wrap the "
            "optimizer: fr_jax.staleness.remember_update(optimizer), outermost."
        )
    accumulation = _accumulation(opt_state.inner_state)
    n = horizon if accumulation is None else (accumulation.count + horizon) // accumulation.period.mini_batches
    distance = lambda u: jnp.asarray(strength * n, u.dtype)
    return jax.tree.map(lambda w, u: w + distance(u) * u, params, opt_state.last_update)
