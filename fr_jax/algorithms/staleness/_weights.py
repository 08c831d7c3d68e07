"""Weights for a pass that is early or late: predicted ones for the forward pass, earlier ones for the replay."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fr_jax.algorithms._losses import wide
from fr_jax.algorithms._validation import Optimizers, check_between, per_stage
from fr_jax.algorithms.staleness._delays import mean_delay
from fr_jax.algorithms.staleness._gradients import accumulation, check_optimizer, has_updated
from fr_jax.types import PyTree

__all__ = [
    "RememberTrendState",
    "RememberUpdateState",
    "corrected",
    "predicted",
    "remember_trend",
    "remember_update",
]


class RememberUpdateState(NamedTuple):
    """State of :func:`remember_update`.

    Attributes:
      last_update: what was last added to the weights, shaped like them; zeros before the first update.
      inner_state: the optimizer's own state.
    """

    last_update: PyTree
    inner_state: PyTree


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
    check_optimizer(optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        inner_state = inner.init(params)
        accumulation(inner_state)  # refuses what it cannot count
        return RememberUpdateState(jax.tree.map(jnp.zeros_like, params), inner_state)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> Any:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        # The old update is read in every case: XLA is not given the buffer of an argument that nothing reads.
        choose = lambda u, old: jnp.where(has_updated(inner_state), u.astype(old.dtype), old)
        last = jax.tree.map(choose, updates, state.last_update)
        return updates, RememberUpdateState(last, inner_state)

    return type(optimizer)(init, update)  # whether it takes extra arguments, such as value=loss


def predicted(
    params: PyTree, opt_state: RememberUpdateState, horizon: float, strength: float = 1.0, momentum: float = 1.0
) -> PyTree:
    """The weights expected ``horizon`` mini-batches from now: w + strength (b + b^2 + .. + b^n) u, u the last update.

    n is the number of updates until then: ``horizon``, under :func:`accumulate` floor((count + horizon) / m).

    With b = 1 the last update is repeated: w + n u. SpecTrain (Chen, Yang, Cheng, "Efficient and robust parallel DNN
    training through model parallelism on multi-GPU platform", arXiv:1809.02839) predicts w - s eta v, with v the
    momentum and s the updates to come: for SGD with momentum, u = -eta v. For other optimizers compare PipeOptim (Guan
    et al., arXiv:2312.00839).

    With b < 1 the last update fades, as momentum does if no gradient comes: w + u (b - b^{n+1}) / (1 - b), which also
    takes a fraction for n. It is the prediction of FTPipe (Eliad, Hakimi, De Jagger, Silberstein, Schuster, USENIX ATC
    2021) for SGD with momentum b. Under Adam, b = b1; the authors' code (saareliad/FTPipe) then adds up the n updates,
    each with the bias correction, the rate and the weight decay of its own step, and the partial sum of gradients in
    the first one.

    Args:
      params: w.
      opt_state: state of a :func:`remember_update`, the outermost wrapper.
      horizon: mini-batches to look ahead, 0 or more.
      strength: 1 goes all the way, 0 stays at w.
      momentum: b, 0 to 1: the optimizer's coefficient, or 1 for a last update that does not fade.

    Returns:
      New arrays like ``params``.

    Raises:
      ValueError: ``opt_state`` is not that of :func:`remember_update`, ``horizon`` is negative, or ``momentum`` is
        outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from fr_jax.algorithms import staleness
      >>> state = staleness.RememberUpdateState(jnp.array(-0.5), inner_state=())
      >>> float(staleness.predicted(jnp.array(3.0), state, horizon=2))
      2.0
      >>> float(staleness.predicted(jnp.array(3.0), state, horizon=2, momentum=0.5))
      2.625
    """
    if not isinstance(opt_state, RememberUpdateState):
        raise ValueError(
            f"predicted() was given an opt_state of type {type(opt_state).__name__}, without a last update. Wrap the "
            "optimizer: fr_jax.staleness.remember_update(optimizer), outermost."
        )
    check_between("momentum", momentum, 0, 1, "b of the optimizer, or 1 for a last update that does not fade")
    check_between("horizon", horizon, 0, math.inf, "the mini-batches to look ahead")
    found = accumulation(opt_state.inner_state)
    n = horizon if found is None else (found.count + horizon) // found.period.mini_batches
    steps = n if momentum == 1 else (momentum - momentum ** (n + 1)) / (1 - momentum)
    distance = lambda u: jnp.asarray(strength * steps, u.dtype)
    return jax.tree.map(lambda w, u: w + distance(u) * u, params, opt_state.last_update)


class RememberTrendState(NamedTuple):
    """State of :func:`remember_trend`.

    Attributes:
      trend: d, the running mean of what was added to the weights, in float32 or wider; zeros before the first update.
      inner_state: the optimizer's own state.
    """

    trend: PyTree
    inner_state: PyTree


def remember_trend(
    optimizer: Optimizers, decay: float, K: int, microbatches: int = 1
) -> tuple[optax.GradientTransformation, ...]:
    """The same optimizers, with a running mean of their updates in their states, for :func:`corrected`.

    It is that of PipeMare's T2 (Yang et al., MLSys 2021, arXiv:1910.05124), for stage k < K and tau_k = (K-k)/M:

        d <- g_k d + (1 - g_k) u,  g_k = D^{1/tau_k}

    u is what is added to the weights, and d starts at 0. So the mean goes back over a number of updates in proportion
    to the delay: an update counts D times as much once it is tau_k updates old. Costs a copy of the weights. Under
    :func:`accumulate` d moves with the updates that are not skipped.

    Args:
      optimizer: one optax transformation for all stages, or a sequence of K.
      decay: D, 0 to 1. 0 remembers the last update only; 1 none, and returns the optimizers as they are. Usual
        values are 0.1 to 0.5.
      K: number of stages.
      microbatches: M, as for :func:`delay`.

    Returns:
      K transformations, those of stages k < K with a :class:`RememberTrendState`.

    Raises:
      ValueError: ``decay`` is outside [0, 1], K or ``microbatches`` is not a positive whole number, or there are not K
        optimizers; from their ``init``, if they accumulate otherwise than by one :func:`accumulate`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fr_jax.algorithms import staleness
      >>> first, last = staleness.remember_trend(optax.sgd(1.0), decay=0.25, K=2)
      >>> _, state = first.update(jnp.array(2.0), first.init(jnp.array(3.0)))
      >>> float(state.trend)
      -1.5
    """
    check_between("decay", decay, 0, 1, "D of PipeMare; 1 is no correction")
    taus, optimizers = mean_delay(K, microbatches), per_stage(optimizer, K)
    late = lambda tau: decay < 1 and tau > 0
    return tuple(
        _remember_mean(o, float(decay) ** (1 / tau)) if late(tau) else o
        for o, tau in zip(optimizers, taus, strict=True)
    )


def _remember_mean(optimizer: optax.GradientTransformation, g: float) -> optax.GradientTransformation:
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        inner_state = inner.init(params)
        accumulation(inner_state)  # refuses what it cannot count
        zero = lambda p: jnp.zeros(p.shape, wide(p.dtype))  # small changes of a mean vanish in bfloat16
        return RememberTrendState(jax.tree.map(zero, params), inner_state)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> Any:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        moved = has_updated(inner_state)
        mean = lambda u, d: jnp.where(moved, g * d + (1 - g) * u.astype(d.dtype), d)
        return updates, RememberTrendState(jax.tree.map(mean, updates, state.trend), inner_state)

    return type(optimizer)(init, update)  # whether it takes extra arguments, such as value=loss


def corrected(params: PyTree, opt_state: RememberTrendState, tau: float) -> PyTree:
    """The weights as they were about ``tau`` mini-batches ago, w - n d, for the backward pass.

    n is the number of updates since then: ``tau``, or under :func:`accumulate`, whose last update was ``count``
    mini-batches ago, ceil((tau - count) / m).

    PipeMare's T2 (:func:`remember_trend`). A gradient should be taken at one set of weights, and stage k's forward pass
    is over by tau_k updates: what is corrected are the weights of the backward pass, back towards those of the forward
    pass. PipeMare stores activations and uses these weights where delta is propagated; features replay computes its
    whole replay with them. They stand in for a copy of the old weights.

    Args:
      params: w.
      opt_state: state of a :func:`remember_trend`, the outermost wrapper.
      tau: mini-batches to go back, 0 or more: :func:`mean_delay` of the stage.

    Returns:
      New arrays like ``params``; for ``tau = 0`` the same, whatever the state.

    Raises:
      ValueError: ``tau`` is negative, or ``opt_state`` is not that of :func:`remember_trend`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fr_jax.algorithms import staleness
      >>> state = staleness.RememberTrendState(jnp.array(-0.5), inner_state=())
      >>> float(staleness.corrected(jnp.array(3.0), state, tau=2))
      4.0
    """
    check_between("tau", tau, 0, math.inf, "the mini-batches to go back")
    if tau == 0:
        return params
    if not isinstance(opt_state, RememberTrendState):
        raise ValueError(
            f"corrected() was given an opt_state of type {type(opt_state).__name__}, without a mean of updates. Wrap "
            "the optimizers: fr_jax.staleness.remember_trend(optimizers, decay, K), outermost."
        )
    found = accumulation(opt_state.inner_state)
    n = tau if found is None else jnp.ceil(jnp.maximum(tau - found.count, 0) / found.period.mini_batches)
    back = lambda w, d: (w.astype(d.dtype) - jnp.asarray(n, d.dtype) * d).astype(w.dtype)
    return jax.tree.map(back, params, opt_state.trend)
