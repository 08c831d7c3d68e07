"""Back-propagation, features replay and DDG over K stages, as loops that store every past input, weight and gradient.

Notation of the Features Replay paper: stages k = 1..K, weights w_k, features h_k = F_k(h_{k-1}; w_k) with h_0 = x,
iterations t = 0, 1, ... of one mini-batch each, and s = t + k - K, the mini-batch whose gradient stage k applies at t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = ["Trajectory", "backpropagation", "ddg", "features_replay"]

Pull: TypeAlias = Callable[[np.ndarray], tuple[Any, np.ndarray]]
Stage: TypeAlias = Callable[[Any, np.ndarray, int], tuple[np.ndarray, Pull]]
Update: TypeAlias = Callable[[Any, Any], Any]
Loss: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]


class Trajectory(NamedTuple):
    """Everything that happened in T iterations of K stages; the lists of stage k are at index k - 1.

    Attributes:
      w: ``w[k - 1][t]``, the weights w_k^t before iteration t; the last of T + 1 entries is after the last iteration.
      h: ``h[k][t]`` for k = 0..K, the features h_k^t of mini-batch t as played; ``h[0]`` are the inputs.
      delta: ``delta[k - 1][t]``, the gradient δ_k with respect to h_k that stage k used at iteration t, of mini-batch
        t + k - K (in back-propagation of mini-batch t); None if it had nothing to do.
      grads: ``grads[k - 1][t]``, the gradient with which w_k was updated at iteration t; None if it was not.
      loss: ``loss[t]``, of mini-batch t as played.
    """

    w: list[list[Any]]
    h: list[list[np.ndarray]]
    delta: list[list[np.ndarray | None]]
    grads: list[list[Any]]
    loss: list[float]


def backpropagation(
    stages: Sequence[Stage], updates: Sequence[Update], loss: Loss, w: Sequence[Any], batches: Iterable[Sequence]
) -> Trajectory:
    """Plain back-propagation: at iteration t every stage applies the gradient of mini-batch t, stage K first.

    δ_K = ∂ℓ/∂h_K, then for k = K..1:  (g_k, δ_{k-1}) = vector-Jacobian product of F_k at (h_{k-1}^t; w_k^t) with δ_k.

    Args:
      stages: F_1, ..., F_K. ``stage(w, h, s) -> (y, pull)``: the features y of input h at weights w for mini-batch
        number s (a dropout mask may depend on s), and ``pull(dy) -> (gradient by w, gradient by h)``. Must be pure.
      updates: one ``(w, g) -> w`` per stage, called once for each of its updates; it may keep a state (momentum).
      loss: ``(outputs, targets) -> (value, gradient by outputs)``.
      w: w_k^0, one per stage: anything that ``stages`` and ``updates`` understand.
      batches: pairs ``(inputs, targets)``; further entries are ignored.

    Raises:
      ValueError: there is no stage, or not one update and one w per stage.

    Example:
      >>> square = lambda w, h, s: (w**2 * h, lambda dy: (2 * w * dy * h, w**2 * dy))
      >>> loss = lambda outputs, targets: (outputs, 1.0)
      >>> updates = [lambda w, g: w - 0.25 * g] * 2
      >>> backpropagation([square] * 2, updates, loss, [1.0, 1.0], [(1.0, None)]).grads
      [[2.0], [2.0]]
    """
    K, run = _start(stages, updates, w)
    for t, (x, targets, *_) in enumerate(batches):
        _play(run, stages, x, t)
        value, delta = loss(run.h[K][t], targets)
        run.loss.append(value)
        for k in range(K, 0, -1):
            _, pull = stages[k - 1](run.w[k - 1][t], run.h[k - 1][t], t)
            g, d_input = pull(delta)
            run.delta[k - 1].append(delta)
            run.grads[k - 1].append(g)
            run.w[k - 1].append(updates[k - 1](run.w[k - 1][t], g))
            delta = d_input
    return run


def features_replay(
    stages: Sequence[Stage], updates: Sequence[Update], loss: Loss, w: Sequence[Any], batches: Iterable[Sequence]
) -> Trajectory:
    """Features replay (papers/features-replay.md, Algorithm 1, equations 4 to 7).

    Play at t:  h_k^t = F_k(h_{k-1}^t; w_k^t) for all k. Replay at t, with s = t + k - K: stage k takes the input
    h_{k-1}^s of its history with **today's weights** w_k^t, and applies the vector-Jacobian product to δ_k, which
    stage k + 1 sent at t - 1; stage K to the gradient of the loss at h_K^t. While s < 0 it does not update.

    Args, Returns, Raises: as :func:`backpropagation`.

    Example:
      >>> square = lambda w, h, s: (w**2 * h, lambda dy: (2 * w * dy * h, w**2 * dy))
      >>> loss = lambda outputs, targets: (outputs, 1.0)
      >>> updates = [lambda w, g: w - 0.25 * g] * 2
      >>> features_replay([square] * 2, updates, loss, [1.0, 1.0], [(1.0, None)] * 3).grads
      [[None, 2.0, 0.25], [2.0, 1.0, 0.125]]
    """
    return _decoupled(stages, updates, loss, w, batches, weights_of=lambda t, s: t)


def ddg(
    stages: Sequence[Stage], updates: Sequence[Update], loss: Loss, w: Sequence[Any], batches: Iterable[Sequence]
) -> Trajectory:
    """Decoupled parallel back-propagation, DDG (papers/decoupled-parallel-backprop.md).

    As :func:`features_replay`, with one difference: the vector-Jacobian product is the one taken at iteration
    s = t + k - K, with the **weights of that time** w_k^s. So the gradient that stage k applies at t is that of
    back-propagation at the weights w^s on mini-batch s, K - k iterations late.

    Args, Returns, Raises: as :func:`backpropagation`.

    Example:
      >>> square = lambda w, h, s: (w**2 * h, lambda dy: (2 * w * dy * h, w**2 * dy))
      >>> loss = lambda outputs, targets: (outputs, 1.0)
      >>> updates = [lambda w, g: w - 0.25 * g] * 2
      >>> ddg([square] * 2, updates, loss, [1.0, 1.0], [(1.0, None)] * 3).grads
      [[None, 2.0, 0.5], [2.0, 1.0, 0.125]]
    """
    return _decoupled(stages, updates, loss, w, batches, weights_of=lambda t, s: s)


def _decoupled(
    stages: Sequence[Stage],
    updates: Sequence[Update],
    loss: Loss,
    w: Sequence[Any],
    batches: Iterable[Sequence],
    weights_of: Callable[[int, int], int],
) -> Trajectory:
    """The loop of both; ``weights_of(t, s)`` is the iteration whose weights differentiate mini-batch s at t."""
    K, run = _start(stages, updates, w)
    sent: list[dict[int, np.ndarray]] = [{} for _ in stages]  # sent[k - 1][t]: what stage k + 1 sent to k at t - 1
    for t, (x, targets, *_) in enumerate(batches):
        _play(run, stages, x, t)
        value, sent[K - 1][t] = loss(run.h[K][t], targets)
        run.loss.append(value)
        for k in range(1, K + 1):
            s = t + k - K
            if s < 0:  # the pipeline fills: there is nothing to replay yet
                run.delta[k - 1].append(None)
                run.grads[k - 1].append(None)
                run.w[k - 1].append(run.w[k - 1][t])
                continue
            delta = sent[k - 1][t]
            # DDG plays again, too: with the weights of iteration s this is its VJP, and only w and h need be stored.
            _, pull = stages[k - 1](run.w[k - 1][weights_of(t, s)], run.h[k - 1][s], s)
            g, d_input = pull(delta)
            if k > 1:
                sent[k - 2][t + 1] = d_input
            run.delta[k - 1].append(delta)
            run.grads[k - 1].append(g)
            run.w[k - 1].append(updates[k - 1](run.w[k - 1][t], g))
    return run


def _play(run: Trajectory, stages: Sequence[Stage], x: np.ndarray, t: int) -> None:
    """h_0^t = x; h_k^t = F_k(h_{k-1}^t; w_k^t) for k = 1..K."""
    run.h[0].append(x)
    for k in range(1, len(stages) + 1):
        y, _ = stages[k - 1](run.w[k - 1][t], run.h[k - 1][t], t)
        run.h[k].append(y)


def _start(stages: Sequence[Stage], updates: Sequence[Update], w: Sequence[Any]) -> tuple[int, Trajectory]:
    K = len(stages)
    if K == 0 or len(updates) != K or len(w) != K:
        raise ValueError(
            f"{K} stages, {len(updates)} updates and {len(w)} weights: give at least one stage, and one update and "
            "one w per stage."
        )
    lists: Callable[[int], list[list[Any]]] = lambda n: [[] for _ in range(n)]
    return K, Trajectory([[w_k] for w_k in w], lists(K + 1), lists(K), lists(K), [])
