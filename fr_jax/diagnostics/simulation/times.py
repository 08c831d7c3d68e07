"""How long the functions of a stage take, and what crosses the cuts: the numbers that schedules are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["StageTimes", "Times", "balanced_shares", "ring_all_reduce_seconds", "times_of_costs"]


class StageTimes(NamedTuple):
    """Seconds that the functions of one stage take for one mini-batch; NaN for what was not measured.

    Attributes:
      play: the forward pass that keeps nothing (features replay).
      replay: forward again, backward and update, one function (features replay).
      forward: the forward pass that keeps its VJP.
      backward: applying that VJP.
      update: the optimizer.
      last: forward, loss, backward and update, one function.
      gradient: the same, of a micro-batch, without the update.
      synthesize: the forward pass of the stage's synthesizer (DNI).
      learn: the synthesizer's gradient and update (DNI).
    """

    play: float = math.nan
    replay: float = math.nan
    forward: float = math.nan
    backward: float = math.nan
    update: float = math.nan
    last: float = math.nan
    gradient: float = math.nan
    synthesize: float = math.nan
    learn: float = math.nan


class Times(NamedTuple):
    """The seconds that a method's schedule is made from.

    ``stages`` has K entries; ``features`` and ``gradients`` have K-1, the seconds that h_k takes from stage k to stage
    k+1, and that delta_k takes back; ``all_reduce`` is the sum over all all-reduces of a data-parallel step.
    """

    stages: tuple[StageTimes, ...]
    features: tuple[float, ...]
    gradients: tuple[float, ...]
    all_reduce: float = 0.0


def times_of_costs(
    costs: Sequence[float],
    transfers: Sequence[float] | float = 0.0,
    *,
    synthesizers: Sequence[float] | float = 0.0,
    update: float = 0.0,
) -> Times:
    """Times by the rule that a backward pass takes twice as long as a forward pass.

    Args:
      costs: K entries, the seconds of each stage's forward and backward pass together, or in any other unit.
      transfers: seconds for a feature to cross a cut, and for its gradient to come back: one for all, or K-1.
      synthesizers: seconds of forward and backward pass of each stage's synthesizer: one for all, or K-1.
      update: seconds of each stage's update; ``replay`` and ``last`` include it.

    Raises:
      ValueError: the numbers of costs, transfers and synthesizers do not fit.

    Example:
      >>> times = times_of_costs([3.0, 6.0], transfers=0.5)
      >>> times.stages[0].play, times.stages[0].replay, times.stages[1].last, times.features
      (1.0, 3.0, 6.0, (0.5,))
    """
    K = len(costs)
    if K < 1:
        raise ValueError("no costs were given; there is one for each of K stages, at least 1.")
    crossing = _for_each_cut("transfers", transfers, K)
    stages = []
    for cost, synthesizer in zip(costs, (*_for_each_cut("synthesizers", synthesizers, K), 0.0), strict=True):
        whole = {"replay": cost + update, "last": cost + update, "gradient": cost}
        parts = {"play": cost / 3, "forward": cost / 3, "backward": 2 * cost / 3, "update": update}
        stages.append(StageTimes(**whole, **parts, synthesize=synthesizer / 3, learn=2 * synthesizer / 3))
    return Times(tuple(stages), crossing, crossing)


def _for_each_cut(name: str, given: Sequence[float] | float, K: int) -> tuple[float, ...]:
    values = tuple(given) if isinstance(given, Sequence) else (given,) * (K - 1)
    if len(values) != K - 1:
        advice = f"there is one for each of the K-1 = {K - 1} cuts. Pass that many, or one number for all."
        raise ValueError(f"{len(values)} {name} were given for {K} stages; {advice}")
    return values


def balanced_shares(K: int, *, last_stage_weight: float = 1.0) -> tuple[float, ...]:
    """The shares of a network, adding up to 1, that :func:`fr_jax.balance` would choose if it could cut anywhere.

    Raises:
      ValueError: K is less than 1, or the weight is not positive.

    Example:
      >>> [round(7 * share, 6) for share in balanced_shares(2, last_stage_weight=3 / 4)]
      [3.0, 4.0]
    """
    if K < 1 or not last_stage_weight > 0:
        given = f"K = {K} and last_stage_weight = {last_stage_weight}"
        raise ValueError(f"{given} were given; K must be at least 1, and the weight positive.")
    total = K - 1 + 1 / last_stage_weight
    return (1 / total,) * (K - 1) + (1 / last_stage_weight / total,)


def ring_all_reduce_seconds(size: float, devices: int, bandwidth: float) -> float:
    """Seconds of an all-reduce of ``size`` bytes in a ring of D devices: 2 (D-1)/D size / bandwidth.

    2 (D-1) messages of size/D follow each other (Patarasuk and Yuan 2009); the bandwidth is that of a link, per second.

    Raises:
      ValueError: ``devices`` is less than 1, the bandwidth is not positive, or the size is negative.

    Example:
      >>> ring_all_reduce_seconds(8e6, devices=2, bandwidth=8e6)
      1.0
    """
    if not (devices >= 1 and bandwidth > 0 and size >= 0):
        given = f"size = {size}, devices = {devices} and bandwidth = {bandwidth}"
        raise ValueError(f"{given} were given; devices must be at least 1, the bandwidth above 0, the size at least 0.")
    return 2 * (devices - 1) * (size / devices / bandwidth)
