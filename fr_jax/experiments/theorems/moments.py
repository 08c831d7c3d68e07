"""The expectations of the theorems: measured over replicas of a run, and for the linear network computed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fr_jax as fr
from fr_jax.experiments.theorems.problems import LAYERS, Problem, loss_fn
from fr_jax.types import Array, Stage

__all__ = ["Moments", "exact", "final_sigma", "measure", "stages_of", "staleness"]


class Moments(NamedTuple):
    """Expectations along the run, ``(T,)`` each but the first; g^t is the direction of all stages in iteration t.

    Attributes:
      excess: ``(T + 1,)``, E f(w^t) - f(w*).
      gradient: E ||grad f(w^t)||^2.
      inner: E <grad f(w^t), g^t>.
      second: E ||g^t||^2.
      against: how often <grad f(w^t), E[g^t | all before iteration t]> is negative, 0 to 1; NaN where not measured.
    """

    excess: np.ndarray
    gradient: np.ndarray
    inner: np.ndarray
    second: np.ndarray
    against: np.ndarray


def stages_of(problem: Problem, K: int, replicas: int) -> tuple[Stage, ...]:
    """The layers as K stages, as equal as can be."""
    return fr.partition(problem.layers(replicas), [round(k * LAYERS / K) for k in range(1, K)])


def staleness(K: int) -> list[int]:
    """K - k, the iterations by which the stage of each layer lags."""
    bounds = [round(k * LAYERS / K) for k in range(K + 1)]
    return [K - 1 - next(k for k in range(K) if layer < bounds[k + 1]) for layer in range(LAYERS)]


def optimizers(rates: np.ndarray, K: int) -> list[optax.GradientTransformation]:
    """SGD with gamma_t = ``rates[t]`` in iteration t for every stage, line 13 of Algorithm 1.

    A schedule counts a stage's own updates, and stage k makes its first in iteration K-k.
    """
    table = jnp.asarray(rates)
    schedule = lambda late: lambda count: table[jnp.minimum(count + late, len(rates) - 1)]
    return [optax.sgd(schedule(K - 1 - k)) for k in range(K)]


def measure(
    problem: Problem,
    K: int,
    rates: np.ndarray,
    *,
    batch_size: int,
    replicas: int,
    seed: int,
    advanced: Callable[[], Any] = lambda: None,
) -> tuple[Moments, Moments]:
    """Runs ``fr.features_replay`` for ``len(rates)`` iterations from w^0, many replicas at once.

    Each replica draws its own mini-batches, with replacement, as Theorems 1 and 2 suppose. Full gradients are over all
    examples, not estimates.

    Args:
      problem: what is trained.
      K: stages, 1 to 4.
      rates: ``(T,)``, gamma_t.
      batch_size: examples of a replica's mini-batch.
      replicas: an even number.
      seed: of the mini-batches.
      advanced: called after each iteration.

    Returns:
      The moments over the first half of the replicas, and over the second.
    """
    method = fr.features_replay(stages_of(problem, K, replicas), loss_fn, optimizers(rates, K), return_grads=True)
    statistics = _statistics(problem, staleness(K))
    found, state = [], None
    for batch in _batches(problem, len(rates), batch_size, replicas, seed):
        state = method.init(jax.random.key(0), batch) if state is None else state
        params = state.params
        state, info = method.step(state, batch)
        # None: a stage that has nothing to replay yet does not move.
        pairs = zip(info.grads or (), params, strict=True)
        grads = tuple(jax.tree.map(jnp.zeros_like, p) if g is None else g for g, p in pairs)
        found.append(statistics(params, grads))
        advanced()
    assert state is not None
    # f(w^T), after the last step; the other quantities of this row are left out below.
    found.append(statistics(state.params, jax.tree.map(jnp.zeros_like, state.params)))
    series = np.stack([np.asarray(one) for one in jax.device_get(found)], axis=-1)  # (half, quantity, T + 1)
    first, second = (Moments(half[0], *half[1:, :-1]) for half in series)
    return first, second


def _batches(problem: Problem, steps: int, batch_size: int, replicas: int, seed: int) -> Iterator[fr.Batch]:
    inputs, targets, key = jnp.asarray(problem.inputs), jnp.asarray(problem.targets), jax.random.key(seed)

    @jax.jit
    def draw(t: Array) -> fr.Batch:
        index = jax.random.randint(jax.random.fold_in(key, t), (batch_size, replicas), 0, len(problem.targets))
        return fr.Batch(inputs[index], targets[index])

    for t in range(steps):
        yield draw(jnp.uint32(t))


def _statistics(problem: Problem, late: Sequence[int]) -> Callable[[Any, Any], Array]:
    """``(params, grads) -> (2, 5)``: the quantities of Moments, the mean over either half of the replicas."""

    @jax.jit
    def statistics(params: Any, grads: Any) -> Array:
        w, g = (jnp.stack(jax.tree.leaves(tree), axis=1) for tree in (params, grads))  # (replicas, LAYERS, m)
        f, full = jax.vmap(jax.value_and_grad(problem.objective))(w)
        # Given the past, only the last stage's direction is still to be drawn; its mean is the full gradient.
        known = jnp.where((jnp.asarray(late) > 0)[None, :, None], g, full)
        inner = lambda a, b: (a * b).sum((1, 2))
        against = inner(full, known) < 0
        each = (f - problem.optimum, inner(full, full), inner(full, g), inner(g, g), against)
        return jnp.stack([x.astype(f.dtype).reshape(2, -1).mean(1) for x in each], axis=1)

    return statistics


def exact(problem: Problem, K: int, rates: np.ndarray, batch_size: int) -> Moments:
    """The moments of the linear network's run, computed and not sampled.

    With v = w - w*, a mini-batch's gradient at w is G = mean of x_i (x_i'v + r_i) over its draws, r_i = x_i'w* - y_i,
    and every stage's direction is a part of one of G^t, .., G^{t-K+1}: q^t = (v^t, G^{t-1}, .., G^{t-K+1}) follows a
    linear recursion q^{t+1} = A_t (q^t, G^t). With E[G | q] = H v and

        E[G G' | q] = 1/B E_i[x_i x_i' (x_i'v + r_i)^2] + (1 - 1/B) H v v' H

    the means and second moments of q close, so the expectations are exact up to rounding.

    Args:
      problem: the linear network.
      K: stages, 1 to 4.
      rates: ``(T,)``, gamma_t.
      batch_size: B, draws of a mini-batch, with replacement.

    Returns:
      The moments; ``against`` is NaN.
    """
    x, N = problem.inputs, len(problem.targets)
    d, slots = x.shape[1], K - 1
    gram = x.T @ x / N
    best = np.linalg.solve(gram, x.T @ problem.targets / N)
    r = x @ best - problem.targets
    late = np.repeat(staleness(K), d // LAYERS)
    n = d * (slots + 1)
    pick = np.zeros((d, n + d))  # (q, G^t) -> g^t
    pick[np.arange(d), np.where(late == 0, n, late * d) + np.arange(d)] = 1.0
    move = np.zeros((n, n + d))  # (q, G^t) -> q^{t+1}, but for the step
    move[:d, :d] = np.eye(d)
    if slots:
        move[d : 2 * d, n:] = np.eye(d)
        move[2 * d :, d : n - d] = np.eye(n - 2 * d)
    mean = np.zeros(n)
    mean[:d] = problem.start.reshape(-1) - best
    second = np.outer(mean, mean)
    excess, rows = [], []
    # One round more, which only reads off f(w^T).
    for rate in [*rates, 0.0]:
        spread = second[:d, :d]
        slope = gram @ spread @ gram
        # E[(x_i'v + r_i)^2] of every example; then E[G q'], and the second moments of (q, G) as blocks.
        weights = np.einsum("ni,ij,nj->n", x, spread, x) + 2 * r * (x @ mean[:d]) + np.square(r)
        cross = gram @ second[:d]
        whole = np.block(
            [[second, cross.T], [cross, (x.T * weights) @ x / N / batch_size + (1 - 1 / batch_size) * slope]]
        )
        excess.append(np.trace(gram @ spread) / 2)
        rows.append((np.trace(slope), np.trace(gram @ whole[:d] @ pick.T), np.trace(pick @ whole @ pick.T), np.nan))
        step = move.copy()
        step[:d] -= rate * pick
        second = step @ whole @ step.T
        second = (second + second.T) / 2  # rounding that is not symmetric would grow
        mean = step @ np.concatenate([mean, gram @ mean[:d]])
    return Moments(np.array(excess), *np.array(rows[:-1]).T)


def final_sigma(problem: Problem, K: int) -> float:
    """What E<grad f, g^t> / E||grad f||^2 of the linear network comes to in the end, for a small fixed step size.

    When f has stopped falling in the mean, E<grad f, g> = gamma/2 E g'Hg, because f is quadratic. For small gamma, g^t
    is noise whose parts for different stages come from different mini-batches: its covariance is back-propagation's,
    S = E_i[x_i x_i' r_i^2] / B, without the blocks between stages. But over many iterations those correlations come
    back, so E||grad f||^2 = gamma/2 tr(H S), as for back-propagation. What remains of the ratio is

        tr(H diag(S_11, .., S_KK)) / tr(H S).

    The argument is this program's, not the paper's.

    Returns:
      1 for K = 1, and for layers whose inputs are uncorrelated; less the more the stages have in common.
    """
    x, N = problem.inputs, len(problem.targets)
    gram = x.T @ x / N
    r = x @ np.linalg.solve(gram, x.T @ problem.targets / N) - problem.targets
    noise = (x.T * np.square(r)) @ x / N
    late = np.repeat(staleness(K), x.shape[1] // LAYERS)
    same = late[:, None] == late[None]
    return float((gram * noise * same).sum() / (gram * noise).sum())
