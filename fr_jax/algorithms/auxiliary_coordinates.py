"""The method of auxiliary coordinates, MAC (Carreira-Perpiñán, Wang 2014, arXiv:1212.5921), by gradient steps.

Each example has coordinates z_1..z_{K-1} for what the stages k < K send on; z_0 = x. They and the weights minimise

    Q(W, Z; mu) = loss(y, F_K(z_{K-1}; w_K)) + mu/2 sum_{k<K} ||z_k - F_k(z_{k-1}; w_k)||^2

with a penalty mu that grows, so that in the end z_k = F_k(z_{k-1}). At iteration t, for a mini-batch of B examples:

    forward   z_k = F_k(z_{k-1}; w_k),  or the kept value where the example has one;  k = 1..K-1
    Z-step    Z <- Z - (eta/mu) dQ/dZ  of each example's own Q, all stages at once, N_z times:
              z_k <- z_k - eta ((z_k - F_k(z_{k-1})) + (1/mu) dQ_{k+1}/dz_k)
    W-step    w_k <- w_k - gamma_t dQ_k/dw_k  of the mean over the batch, all stages at once, N_w times
              Q_k = mu/2 ||z_k - F_k(z_{k-1}; w_k)||^2,  k < K;   Q_K = loss(y, F_K(z_{K-1}; w_K))

If the mean of Q over a number of mini-batches has not fallen by a hundredth since the same number before, mu grows by a
factor. The paper has all examples in each step, and solves each step to the end. BlockProp is the nearest relative: it
has no factor 1/2, a fixed penalty, and an h-step that goes from the last stage to the second, each with the new value
of the one above.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax._arrays import place, put
from fr_jax._placement import jit, replicated
from fr_jax.algorithms import _example_cache as cache
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._losses import loss_of, wide
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_train
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_count, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["AuxiliaryCoordinatesState", "auxiliary_coordinates"]

STALLED = 0.01
"""Progress is a fall of Q by this part of it."""


class Coordinates(NamedTuple):
    """The checked arguments: mu at the start, its factor, mini-batches to judge by, N_w, N_z, eta, N (or None)."""

    penalty: float
    growth: float
    patience: int
    w_steps: int
    z_steps: int
    rate: float
    cache_size: int | None


class Progress(NamedTuple):
    """What tells when mu grows, scalars: the sum and number of the values of Q, and the mean of those before.

    Without any before, that is the largest number: a state with an infinite one would count as diverged.
    """

    total: Array
    count: Array
    before: Array


class AuxiliaryCoordinatesState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`), and what the method keeps; nothing is in flight.

    Attributes:
      cache: z_{k-1} of every example, ``(N, ...)``, on the devices of stage k, whose input it is; ``()`` for stage 1,
        and for all without ``cache_size``.
      visits: how often each example was seen, ``(N,)`` int32; ``()`` without ``cache_size``.
      penalty: mu on the devices of each stage, a scalar.
      progress: :class:`Progress` on the devices of stage K; ``()`` if mu does not grow.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    cache: tuple[PyTree, ...]
    visits: tuple[PyTree, ...]
    penalty: tuple[Array, ...]
    progress: PyTree
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    own: Coordinates,
    setup: Setup,
    parts: AuxiliaryCoordinatesParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> AuxiliaryCoordinatesState:
    """Weights w^0 and mu; no example has been seen."""
    stages = init_stages(setup, key, batch, params, model_state)
    cache.check_index(own.cache_size, batch)
    kept, visits = cache.empty(own.cache_size, stages.features, setup.shardings)
    here, dtype = [replicated(sharding) for sharding in setup.shardings], jnp.result_type(float)
    scalar = lambda value, k: place(jnp.asarray(value, dtype), here[k])
    progress = Progress(scalar(0, -1), place(jnp.zeros((), jnp.int32), here[-1]), scalar(jnp.finfo(dtype).max, -1))
    return AuxiliaryCoordinatesState(
        **stages.fields(),
        cache=kept,
        visits=visits,
        penalty=tuple(scalar(own.penalty, k) for k in range(len(here))),
        progress=progress if parts.watch else (),
    )


def squared_distance(a: PyTree, b: PyTree) -> Array:
    """||a - b||^2: the sum over the features, the mean over the batch."""
    difference = jax.tree.map(lambda a, b: a.astype(wide(a.dtype)) - b.astype(wide(b.dtype)), a, b)
    total: Any = optax.tree.norm(difference, squared=True)
    return total / jax.tree.leaves(a)[0].shape[0]


class AuxiliaryCoordinatesParts(NamedTuple):
    """The jitted functions; ``forwards`` are those of stages 1..K-1, ``slopes`` and ``moves`` those of 2..K."""

    forwards: tuple[Callable, ...]
    memories: tuple[tuple[Callable, Callable], ...]
    slopes: tuple[Callable, ...]
    moves: tuple[Callable, ...]
    learns: tuple[Callable, ...]
    watch: Callable | None


def make_parts(setup: Setup, own: Coordinates) -> AuxiliaryCoordinatesParts:
    """Forward pass, kept values, Z-step and W-step of every stage. ``Q[k]`` is what its output is trained with."""
    stages, optimizers, shardings, donate = setup.stages, setup.optimizers, setup.shardings, setup.donate
    K, report = len(stages), setup.metrics_fn
    fit = lambda out, goal: out[1].astype(wide(jax.tree.leaves(out[0])[0].dtype)) / 2 * squared_distance(out[0], goal)
    Q = [*(fit,) * (K - 1), lambda out, targets: loss_of(setup.loss_fn, out[0], targets)]
    metrics: list[Any] = [
        *(lambda out, goal, k=k: {f"coordinate_error/{k}": squared_distance(out[0], goal)} for k in range(1, K)),
        None if report is None else lambda out, targets: report(out[0], targets),
    ]
    gluing = [*(cache.make_gluing(stage, if_due=False) for stage in stages[:-1]), stages[-1]]
    options = {"return_grads": setup.return_grads, "donate": donate, "skip": setup.skip_nonfinite}
    learn = functools.partial(make_train, input_gradient=False, **options)
    return AuxiliaryCoordinatesParts(
        forwards=tuple(
            functions.make_play(gluing[k], shardings[k], update_stats=False, donate=donate) for k in range(K - 1)
        ),
        memories=tuple(cache.make_memory(1, sharding, donate=donate) for sharding in shardings),
        slopes=tuple(make_slope(with_penalty(gluing[k]), Q[k], shardings[k], send=k < K - 1) for k in range(1, K)),
        moves=tuple(make_move(own.rate, shardings[k]) for k in range(1, K)),
        learns=tuple(
            learn([with_penalty(stages[k])], Q[k], optimizers[k : k + 1], shardings[k], metrics_fn=metrics[k])
            for k in range(K)
        ),
        watch=make_watch(own, shardings[-1]) if own.growth > 1 and K > 1 else None,
    )


def with_penalty(stage: Stage) -> Stage:
    """The stage for ``(z, penalty)``, which it sends on as ``(F_k(z), penalty)``."""

    def apply(params: PyTree, model_state: PyTree, x: Any, /, **options: Any) -> tuple[PyTree, PyTree]:
        out, new_state = stage.apply(params, model_state, x[0], **options)
        return (out, x[1]), new_state

    return Stage(stage.init, apply)


def make_slope(stage: Stage, Q: Callable, sharding: Sharding | None, *, send: bool) -> Callable:
    """``(params, model_state, stream, z, penalty, goal) -> (F_k(z) or None, dQ_k/dz)``, the sum over the batch.

    ``goal`` is z_{k+1}, or the targets.
    """

    def slope(
        params: PyTree, model_state: PyTree, stream: KeyStream, z: PyTree, penalty: Array, goal: PyTree
    ) -> tuple[PyTree | None, PyTree]:
        key = stream.at()

        def of_examples(z: PyTree) -> tuple[Array, PyTree | None]:
            out, _ = stage.apply(params, model_state, (z, penalty), key=key, train=True)
            mean = Q(out, goal)
            return jax.tree.leaves(z)[0].shape[0] * mean.astype(wide(mean.dtype)), out[0] if send else None

        slope, out = jax.grad(of_examples, has_aux=True)(z)
        return out, slope

    return jit(slope, out_shardings=(sharding, sharding))


def make_move(rate: float, sharding: Sharding | None) -> Callable:
    """``(z, p, slope, penalty) -> z``: one step on Q, for p = F_k(z_{k-1}) and the slope of Q_{k+1}."""

    def move(z: PyTree, p: PyTree, slope: PyTree, penalty: Array) -> PyTree:
        return jax.tree.map(lambda z, p, s: z - rate * ((z - p) + s / penalty.astype(s.dtype)), z, p, slope)

    return jit(move, out_shardings=sharding)


def make_watch(own: Coordinates, sharding: Sharding | None) -> Callable:
    """``(progress, penalty, terms) -> (progress, penalty)``: mu grows if Q, the sum of the terms, no longer falls."""

    def watch(progress: Progress, penalty: Array, terms: Sequence[Array]) -> tuple[Progress, Array]:
        total = progress.total + sum(term.astype(progress.total.dtype) for term in terms)
        count = progress.count + 1
        full, mean = count == own.patience, total / own.patience
        stalled = full & (mean > progress.before - STALLED * jnp.abs(progress.before))
        before = jnp.where(stalled, jnp.finfo(mean.dtype).max, jnp.where(full, mean, progress.before))
        progress = Progress(jnp.where(full, 0, total), jnp.where(full, 0, count), before)
        return progress, jnp.where(stalled, own.growth * penalty, penalty)

    return jit(watch, out_shardings=replicated(sharding))


def step(
    own: Coordinates,
    setup: Setup,
    parts: AuxiliaryCoordinatesParts,
    state: AuxiliaryCoordinatesState,
    batch: Batch,
) -> tuple[AuxiliaryCoordinatesState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now, K, mu = Iteration(setup, state, batch, any_size=True), len(setup.stages), state.penalty
    cache.check_index(own.cache_size, batch)
    kept, visits = list(state.cache), list(state.visits)
    unset: list[Any] = [None] * K
    index, p, z, slopes, terms = (unset.copy() for _ in range(5))
    fields = lambda k: (now.params[k], now.model_state[k], now.streams[k])

    # Forward, one stage after the other; z[k] is the input of stage k, counted from 0.
    z[0], p[0] = now.send(batch.inputs, 0), ()
    for k in range(K):
        if k > 0:
            out, *_ = parts.forwards[k - 1](*fields(k - 1), z[k - 1])
            z[k] = p[k] = now.send(out, k)
        if own.cache_size:
            index[k] = now.send(batch.index, k)
            recalled, _, visits[k] = parts.memories[k][0](visits[k], kept[k], index[k], p[k])
            z[k] = recalled if k > 0 else z[k]
    targets = now.send(batch.targets, -1)
    goal = lambda k: targets if k == K - 1 else now.send(z[k + 1], k)

    # Z-step, all stages at once: first every slope, then every move.
    for _ in range(own.z_steps):
        for k in range(1, K):
            out, slopes[k] = parts.slopes[k - 1](*fields(k), z[k], mu[k], goal(k))
            if k < K - 1:
                p[k + 1] = now.send(out, k + 1)
        for k in range(1, K):
            z[k] = parts.moves[k - 1](z[k], p[k], slopes[k], mu[k])

    # W-step, all stages at once. The last one's loss is the step's.
    for k in range(K):
        fixed = goal(k)
        for _ in range(own.w_steps):
            now.train(parts.learns[k], (z[k], mu[k]), fixed, stages=slice(k, k + 1))
            terms[k] = now.loss if terms[k] is None else terms[k]
        if own.cache_size and k > 0:
            kept[k] = parts.memories[k][1](kept[k], index[k], z[k])

    if parts.watch is None:
        return now.finish(state, cache=kept, visits=visits)
    last = replicated(setup.shardings[-1])
    progress, grown = parts.watch(state.progress, mu[-1], put(terms, last))
    now.metrics["penalty"] = mu[-1]
    penalty = [put(grown, replicated(sharding)) for sharding in setup.shardings]
    state, info = now.finish(state, cache=kept, visits=visits, penalty=penalty)
    return state._replace(progress=progress), info


def check_own(
    penalty: float,
    penalty_growth: float,
    penalty_patience: int,
    w_steps: int,
    z_steps: int,
    z_learning_rate: float,
    cache_size: int | None,
) -> Coordinates:
    """Raises ValueError for a number or a count that cannot be used."""
    numbers_above_0: dict[str, Any] = {"penalty": penalty, "z_learning_rate": z_learning_rate}
    for name, value in numbers_above_0.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
            raise ValueError(f"{name} = {value!r} was given; it must be a finite number above 0.")
    growth: Any = penalty_growth
    if not isinstance(growth, numbers.Real) or isinstance(growth, bool) or not 1 <= float(growth) < math.inf:
        raise ValueError(
            f"penalty_growth = {growth!r} was given; it is a factor, a finite number of 1 or more. 1 keeps the penalty."
        )
    if cache_size is not None:
        check_count("cache_size", cache_size)
    return Coordinates(
        float(penalty),
        float(growth),
        check_count("penalty_patience", penalty_patience),
        check_count("w_steps", w_steps),
        check_count("z_steps", z_steps, 0),
        float(z_learning_rate),
        cache_size,
    )


def auxiliary_coordinates(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    penalty: float = 1.0,
    penalty_growth: float = 2.0,
    penalty_patience: int = 100,
    w_steps: int = 1,
    z_steps: int = 1,
    z_learning_rate: float = 0.1,
    cache_size: int | None = None,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """The method of auxiliary coordinates, MAC (Carreira-Perpiñán, Wang 2014), by mini-batches and gradient steps.

    A Z-step carries what the last stage wants one stage further down. Without kept coordinates the stages below
    K - z_steps learn nothing, so give K-1 steps or more; with them it arrives after as many visits. At the minimum over
    Z the gradient of each stage is that of back-propagation but for an error that falls as 1/mu; after one step from
    the forward pass stage K-1's is eta times as large.

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=Q_k``.
      penalty: mu at the start.
      penalty_growth: the factor by which mu grows; 1 keeps it.
      penalty_patience: mini-batches over which Q is averaged; if it has not fallen by 1 % since as many before, mu
        grows.
      w_steps: N_w, optimizer steps of every stage in an iteration; each draws its own dropout masks, and moves running
        statistics. The Z-steps and the first W-step have the same masks.
      z_steps: N_z, gradient steps of the coordinates in an iteration; with 0 only stage K learns.
      z_learning_rate: eta; the step size is eta/mu of an example's own Q, for any batch size.
      cache_size: N, keeps z_k ``(N, ...)`` of every example on the device of the stage that reads it. ``batch.index``
        ``(B,)`` says which they are; one outside 0..N-1 is new each time and not kept.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each stage's dQ_k/dw_k (of the last W-step) in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics, computed by stage K from z_{K-1}.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights, optimizer and
        statistics stay as they are. ``Info.metrics["skipped/k"]`` is then 1, else 0.

    Returns:
      The algorithm. ``Info.loss`` is Q_K, at z_{K-1}: lower than the network's own loss. Its metrics hold
      ``coordinate_error/k``, the mean of ||z_k - F_k(z_{k-1})||^2, and ``penalty`` where mu grows. K = 1 with one
      W-step is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers or shardings, a penalty or rate not above 0, a factor below 1,
        a count too small; from ``init`` and ``step`` on a batch or index that does not fit.

    Example:
      >>> import flax.linen as nn, fr_jax as fr, jax, jax.numpy as jnp, optax
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.auxiliary_coordinates(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1), penalty_growth=1)
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state, info = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> sorted(info.metrics)
      ['coordinate_error/1', 'gradient_norm/1', 'gradient_norm/2']
    """
    setup = check_setup(
        stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn, skip_nonfinite=skip_nonfinite
    )
    own = check_own(penalty, penalty_growth, penalty_patience, w_steps, z_steps, z_learning_rate, cache_size)
    return make_algorithm(
        setup, functools.partial(init, own), functools.partial(step, own), lambda: make_parts(setup, own)
    )
