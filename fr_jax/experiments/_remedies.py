"""The settings against stale gradients that several methods have, and what they make of the optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optax

from fr_jax.algorithms import staleness
from fr_jax.experiments._fields import SettingsError, own_setting

__all__ = ["ACCUMULATE", "DISCREPANCY_DECAY", "OF_OPTIMIZERS", "REMEDIES", "check_prediction", "remedied"]

GRADIENT_SHRINKING = own_setting(
    "gradient_shrinking", float, "FDG's factor b: stage k's gradient is shrunk by b^(K-k); 1 is off.", above=0, most=1
)
ACCUMULATE = own_setting("accumulate", int, "ADL's m: one update for the mean gradient of m mini-batches.", least=1)
WEIGHT_PREDICTION = own_setting(
    "weight_prediction",
    float,
    "SpecTrain: how far the forward pass goes towards the weights of the update, 0 to 1.",
    least=0,
)
PREDICTION_MOMENTUM = own_setting(
    "prediction_momentum",
    float,
    "FTPipe: the optimizer's momentum, by which the last update fades in --weight-prediction; 1: it does not.",
    least=0,
    most=1,
)
DISCREPANCY_DECAY = own_setting(
    "discrepancy_decay",
    float,
    "PipeMare's T2: D, 0.1 to 0.5, for replays with weights moved back to about those of the play; 1 is off.",
    least=0,
    most=1,
)
RESCHEDULING = own_setting(
    "rescheduling",
    int,
    "PipeMare's T1: updates over which stage k's learning rate rises to the full one, from M/(K-k) of it; 0 is off.",
    least=0,
)
SPIKE_COMPENSATION = own_setting(
    "spike_compensation", bool, "With --optimizer sgd: momentum makes up for the updates that a gradient has missed."
)
LATE_B1 = own_setting(
    "late_b1",
    float,
    "With --optimizer nadam: b1 of a stage that is K updates late; 0.9, that of the last stage, is off.",
    least=0,
    below=1,
)

REMEDIES: dict[Any, Any] = {
    GRADIENT_SHRINKING: 1.0,
    ACCUMULATE: 1,
    WEIGHT_PREDICTION: 0.0,
    PREDICTION_MOMENTUM: 1.0,
    RESCHEDULING: 0,
    SPIKE_COMPENSATION: False,
    LATE_B1: 0.99,
}
"""Of a method whose gradients are late, with their defaults."""
OF_OPTIMIZERS = (SPIKE_COMPENSATION.name, LATE_B1.name)
"""Those with which an optimizer is made (``_run/optimizers.py``)."""


def remedied(
    own: Mapping[str, Any], optimizer: Any, K: int
) -> tuple[dict[str, Any], Sequence[optax.GradientTransformation]]:
    """The settings that the method takes, and the stages' optimizers (one for all, or K) wrapped as the others say."""
    left = {name: value for name, value in own.items() if name not in OF_OPTIMIZERS}
    every = left.pop("accumulate")
    one_for_all = isinstance(optimizer, optax.GradientTransformation)
    each = tuple(staleness.accumulate(one, every) for one in ((optimizer,) if one_for_all else optimizer))
    factor, updates = left.pop("gradient_shrinking", 1.0), left.pop("rescheduling", 0)
    shrunk = staleness.shrink_gradients(each[0] if one_for_all else each, factor, K)
    return left, staleness.rescheduled(shrunk, updates, K, left["microbatches"] * every)


def check_prediction(own: Mapping[str, Any], K: int) -> None:
    """Raises SettingsError if the remedies that change weights do not go together."""
    ahead, b, D = own["weight_prediction"], own["prediction_momentum"], own.get("discrepancy_decay", 1.0)
    if b < 1 and not ahead:
        raise SettingsError(
            f"--prediction-momentum {b} is a setting of weight prediction, which is off. Add --weight-prediction 1, or "
            "drop the flag."
        )
    if ahead and D < 1:
        raise SettingsError(
            f"--weight-prediction {ahead} and --discrepancy-decay {D} were both given: the first takes the play to the "
            "weights of the replay, the second the replay back to those of the play. Use one of them."
        )
