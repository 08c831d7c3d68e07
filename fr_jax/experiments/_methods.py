"""The methods and models of the programs: titles, costs, settings of their own, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

import fr_jax as fr
from fr_jax.experiments._cli.settings import SharedSettings, TrainSettings
from fr_jax.partitioning.costs import StageWork
from fr_jax.types import Algorithm, Stage

__all__ = ["METHODS", "MODEL_SETTINGS", "Method", "owners"]


class Method(NamedTuple):
    """What the programs know of a method.

    Attributes:
      title: its name for people.
      learning_rate: default step size for a residual network where K > 1.
      own: its own settings, and their defaults.
      work: ``(settings, k) -> StageWork``, what stage k = 0..K-1 does in a step.
      make: ``(settings, stages, loss_fn, optimizer, examples, num_classes, **common) -> Algorithm``; ``examples`` is
        the size of the training set.
      note: what a reader of its training loss must know; empty for nothing.
    """

    title: str
    learning_rate: float
    own: Mapping[str, Any]
    work: Callable[[TrainSettings, int], StageWork]
    make: Callable[..., Algorithm]
    note: str = ""


def _fr(s: TrainSettings, stages: Sequence[Stage], loss: Any, optimizer: Any, *data: int, **common: Any) -> Algorithm:
    own: dict[str, Any] = {"batch_stats": s.batch_stats, "weight_prediction": s.weight_prediction}
    return fr.features_replay(stages, loss, _less_stale(s, optimizer), **own, **common)


def _ddg(s: TrainSettings, stages: Sequence[Stage], loss: Any, optimizer: Any, *data: int, **common: Any) -> Algorithm:
    return fr.ddg(stages, loss, _less_stale(s, optimizer), weight_prediction=s.weight_prediction or 0.0, **common)


def _less_stale(s: TrainSettings, optimizer: optax.GradientTransformation) -> Sequence[optax.GradientTransformation]:
    optimizer = fr.staleness.accumulate(optimizer, s.accumulate or 1)
    return fr.staleness.shrink_gradients(optimizer, s.gradient_shrinking or 1.0, s.K)


def _bp(s: TrainSettings, stages: Sequence[Stage], loss: Any, optimizer: Any, *data: int, **common: Any) -> Algorithm:
    return fr.backprop(stages, loss, fr.staleness.accumulate(optimizer, s.accumulate or 1), **common)


def _dni(
    s: TrainSettings, stages: Sequence[Stage], loss: Any, optimizer: Any, examples: int, num_classes: int, **common: Any
) -> Algorithm:
    synthesizer = fr.models.synthesizer(num_classes if s.label_conditioning else None, hidden=s.synthesizer_hidden)
    learner = optax.adam(s.synthesizer_learning_rate or 0.0)
    own = {"label_conditioning": s.label_conditioning}
    return fr.dni(stages, loss, optimizer, synthesizer, learner, **own, **common)


def _blockprop(
    s: TrainSettings, stages: Sequence[Stage], loss: Any, optimizer: Any, examples: int, *data: int, **common: Any
) -> Algorithm:
    own = {name: getattr(s, name) for name in ("penalty", "h_steps", "h_learning_rate", "h_every")}
    return fr.blockprop(stages, loss, optimizer, cache_size=examples if s.cache else None, **own, **common)


def _gpipe(
    s: TrainSettings, stages: Sequence[Stage], loss: Any, optimizer: Any, *data: int, **common: Any
) -> Algorithm:
    return fr.gpipe(stages, loss, optimizer, microbatches=s.microbatches or 1, **common)


def _one_pass(s: TrainSettings, k: int) -> StageWork:
    """Forward and backward, once."""
    return StageWork()


def _play_and_replay(s: TrainSettings, k: int) -> StageWork:
    """A forward pass, and a replay; the last stage's play is its replay."""
    return StageWork(plays=float(k < s.K - 1))


def _blockprop_work(s: TrainSettings, k: int) -> StageWork:
    """Stages but the last run forward; those but the first take h-steps; each does its W-step."""
    return StageWork(plays=float(k < s.K - 1), input_passes=float(s.h_steps or 0) if k > 0 else 0.0)


AGAINST_STALENESS = {"accumulate": 1, "gradient_shrinking": 1.0, "weight_prediction": 0.0}

METHODS: dict[str, Method] = {
    "fr": Method(
        title="features replay",
        learning_rate=0.05,
        own={"batch_stats": "play", **AGAINST_STALENESS},
        work=_play_and_replay,
        make=_fr,
    ),
    "bp": Method(
        title="back-propagation",
        learning_rate=0.1,
        own={"accumulate": 1},
        work=_one_pass,
        make=_bp,
    ),
    "ddg": Method(
        title="DDG",
        learning_rate=0.05,
        own=AGAINST_STALENESS,
        work=_one_pass,
        make=_ddg,
    ),
    "dni": Method(
        title="DNI",
        learning_rate=0.015,
        own={"synthesizer_hidden": None, "synthesizer_learning_rate": 1e-3, "label_conditioning": False},
        work=_one_pass,
        make=_dni,
    ),
    "blockprop": Method(
        title="BlockProp",
        learning_rate=0.05,
        own={"penalty": 1.0, "h_steps": 1, "h_learning_rate": 0.01, "cache": False, "h_every": 1},
        work=_blockprop_work,
        make=_blockprop,
        note="BlockProp's training loss is taken at its gluing variables, where it is lower than the network's own.",
    ),
    "gpipe": Method(
        title="GPipe",
        learning_rate=0.1,
        own={"microbatches": 4},
        work=_one_pass,
        make=_gpipe,
    ),
}

MODEL_SETTINGS: dict[str, dict[str, Any]] = {"mlp": {"depth": 6, "width": 256, "dropout_rate": 0.0}}
"""Model -> its own settings, and their defaults."""


def owners(name: str) -> list[str]:
    """The methods, or the models, that a setting belongs to; none where it belongs to all."""
    methods = [method for method, entry in METHODS.items() if name in entry.own]
    return methods or [model for model, own in MODEL_SETTINGS.items() if name in own]


def own_defaults(method: str, model: str) -> dict[str, Any]:
    """The defaults of the settings that belong to the method or to the model."""
    return {**METHODS[method].own, **MODEL_SETTINGS.get(model, {})}


def own_settings(settings: SharedSettings, method: str) -> dict[str, Any]:
    """The settings that belong to the method or to the model, as given or by default."""
    own = own_defaults(method, settings.model)
    chosen = {name: getattr(settings, name) for name in own}
    return {name: own[name] if value is None else value for name, value in chosen.items()}
