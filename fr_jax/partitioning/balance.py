"""Where to cut a network: the cuts that make the slowest stage fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["balance", "balance_stages"]


def balance(costs: Sequence[float], K: int, *, last_stage_weight: float = 1.0) -> tuple[int, ...]:
    """Cuts a list of layers into K stages so that the slowest stage is as fast as possible.

    A stage costs the sum of its layers; see :func:`balance_stages` for others.

    Args:
      costs: one non-negative number per layer (:func:`fr_jax.layer_costs`).
      K: number of stages, 1 to ``len(costs)``.
      last_stage_weight: what a unit of cost counts in the last stage. Features replay does 4 units of work in each
        stage (play 1, replay 1, backward 2), but 3 in the last, whose play is its replay: use 0.75.

    Returns:
      K-1 increasing positions; stage k holds ``layers[cuts[k-1]:cuts[k]]``.

    Raises:
      ValueError: K is out of range, a cost is negative or not finite, or the weight is not above 0.

    Example:
      >>> import fr_jax as fr
      >>> fr.balance([4.0, 1.0, 1.0, 2.0, 2.0], 2)
      (2,)
    """
    L = len(costs)
    _check(K, L)
    if not all(np.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(f"costs must be finite and at least 0; given were {list(costs)}.")
    if not 0 < last_stage_weight < np.inf:
        raise ValueError(f"last_stage_weight = {last_stage_weight} was given; it must be finite and above 0.")
    total = np.concatenate([[0.0], np.cumsum(np.asarray(costs, float))])

    def stage_costs(k: int, starts: range, stop: int) -> np.ndarray:
        weight = last_stage_weight if k == K - 1 else 1.0
        return weight * (total[stop] - total[starts.start : starts.stop])

    return _best_cuts(stage_costs, L, K)


def balance_stages(stage_cost: Callable[[int, int, int], float], layers: int, K: int) -> tuple[int, ...]:
    """As :func:`balance`, for stages that cost something other than the sum of their layers.

    In features replay the last stage does not play, and the first computes no gradient for its input; a synthesizer
    belongs to a cut.

    ``stage_cost(k, start, stop)`` is the cost of stage k = 0..K-1 if it holds ``layers[start:stop]``, in any unit;
    ``layers`` is their number L.

    Raises:
      ValueError: K is out of range, or a cost is negative or not finite.

    Example:
      >>> balance_stages(lambda k, start, stop: (2.0 if k == 0 else 1.0) * (stop - start), 9, 2)
      (3,)
    """
    _check(K, layers)

    def stage_costs(k: int, starts: range, stop: int) -> np.ndarray:
        found = np.asarray([stage_cost(k, start, stop) for start in starts], float)
        if not (np.isfinite(found) & (found >= 0)).all():
            raise ValueError(
                f"stage_cost({k}, start, {stop}) was {found.tolist()} for start = {starts.start} to {starts.stop - 1}; "
                "costs must be finite and at least 0."
            )
        return found

    return _best_cuts(stage_costs, layers, K)


def _check(K: int, L: int) -> None:
    if not 1 <= K <= L:
        raise ValueError(f"K = {K} stages were asked of {L} layers; K can be 1 to {L}. Use a smaller K or more layers.")


def _best_cuts(stage_costs: Callable[[int, range, int], np.ndarray], L: int, K: int) -> tuple[int, ...]:
    """Exact, by dynamic programming in O(K L^2)."""
    # best[k][i]: the least possible cost of the slowest of the first k stages if they hold the first i layers.
    best = np.full((K + 1, L + 1), np.inf)
    start_of_last = np.zeros((K + 1, L + 1), int)
    best[0, 0] = 0.0
    for k in range(1, K + 1):
        stops = range(k, L - (K - k) + 1) if k < K else range(L, L + 1)
        for i in stops:  # every later stage needs at least one layer
            starts = range(k - 1, i) if k > 1 else range(1)
            slowest = np.maximum(best[k - 1, starts.start : starts.stop], stage_costs(k - 1, starts, i))
            j = int(np.argmin(slowest))  # the first of equal ones: recorded runs have these cuts
            best[k, i], start_of_last[k, i] = slowest[j], starts[j]
    cuts, i = [], L
    for k in range(K, 1, -1):
        i = int(start_of_last[k, i])
        cuts.append(i)
    return tuple(reversed(cuts))
