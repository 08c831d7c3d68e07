"""Costs, work and balance in one: a list of layers cut where it suits a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from fr_jax.partitioning.balance import balance_stages
from fr_jax.partitioning.costs import Inputs, StageWork, layer_flops, layer_times, stage_cost
from fr_jax.stages import partition
from fr_jax.types import Stage

__all__ = ["WORK", "cut"]

WORK: dict[str, Callable[..., StageWork]] = {
    "fr": lambda k, K: StageWork(plays=float(k < K - 1)),  # the last stage's play is its replay
    "bp": lambda k, K: StageWork(),
    "ddg": lambda k, K: StageWork(),
    "dni": lambda k, K: StageWork(),
    # Stages but the last run forward, those but the first take h-steps, each does its W-step.
    "blockprop": lambda k, K, h_steps=1: StageWork(plays=float(k < K - 1), input_passes=float(h_steps) if k else 0.0),
    "gpipe": lambda k, K: StageWork(),
    "2bw": lambda k, K: StageWork(),
}
"""``(k, K) -> StageWork``: what stage k = 0..K-1 does in one step of each method."""


def cut(
    layers: Sequence[Stage],
    K: int,
    example_inputs: Inputs,
    *,
    method: str = "fr",
    measure: Literal["flops", "time"] = "flops",
) -> tuple[Stage, ...]:
    """Cuts a network into K stages so that the slowest stage of a method is as fast as possible.

    The same as :func:`fr_jax.layer_flops` or :func:`fr_jax.layer_times`, :func:`fr_jax.balance_stages` with the work of
    each stage, and :func:`fr_jax.partition`. Synthesizers (DNI) are not counted.

    Args:
      layers: the network, one stage per layer, first to last.
      K: number of stages, 1 to ``len(layers)``.
      example_inputs: ``(B, ...)``, a mini-batch or a ``jax.ShapeDtypeStruct``.
      method: ``"fr"``, ``"bp"``, ``"ddg"``, ``"dni"``, ``"blockprop"`` or ``"gpipe"``.
      measure: ``"flops"``, counted by XLA without running anything; or ``"time"``, measured on the default device.
        Measured times differ from process to process: in a run of several, measure in one.

    Raises:
      ValueError: K is out of range, or ``method`` or ``measure`` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, fr_jax as fr
      >>> stages = fr.cut(fr.models.mlp(depth=6, width=64), 3, jax.ShapeDtypeStruct((8, 64), jnp.float32))
      >>> [len(stage.layers) for stage in stages]
      [2, 1, 3]
    """
    if method not in WORK:
        raise ValueError(f"method = {method!r} is unknown; it can be {', '.join(map(repr, WORK))}.")
    if measure not in ("flops", "time"):
        raise ValueError(f"measure = {measure!r} is unknown; it can be 'flops' or 'time'.")
    costs = (layer_flops if measure == "flops" else layer_times)(layers, example_inputs)
    work = [WORK[method](k, K) for k in range(K)]
    cuts = balance_stages(lambda k, start, stop: stage_cost(costs, work[k], start, stop), len(layers), K)
    return partition(layers, cuts)
