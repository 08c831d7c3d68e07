"""From settings as given to those of a run: checks of several values, defaults, and what may change on resume."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fr_jax.experiments._cli.settings import (
    ADAPTIVE_RATE,
    PRESETS,
    Resolved,
    SharedSettings,
    TrainSettings,
    belongs,
    from_json,
    given,
    own_of_method,
    own_of_model,
    owners,
)
from fr_jax.experiments._fields import SettingsError, check_fields, choice, flag, guard, text
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._models import MODEL_CARDS
from fr_jax.models import MODELS

__all__ = [
    "check",
    "check_cuts",
    "check_own",
    "check_parts",
    "check_shared",
    "default_workdir",
    "differences",
    "resolve",
]


def check_shared(settings: SharedSettings, methods: Iterable[str]) -> None:
    """Checks what runs by the given methods have in common.

    Raises:
      SettingsError: for the first setting that cannot be used.
    """
    methods = tuple(methods)
    check_fields(settings)
    for method in methods:
        choice("method", method, METHODS)
    _check_owners(settings, methods)
    _check_cards(settings, methods)
    _check_optimizer(settings, methods)
    if settings.steps is not None and settings.epochs is not None:
        raise SettingsError("--steps and --epochs were both given; a run has one length. Drop one of them.")
    if settings.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise SettingsError("--tensorboard needs tensorboardX: pip install 'fr_jax[tensorboard]', or drop the flag.")


def _check_owners(settings: SharedSettings, methods: Sequence[str]) -> None:
    """A setting that neither the model nor one of the methods has is an error; it is not ignored."""
    for field in dataclasses.fields(settings):
        having = guard(field).owners
        if having and given(settings, field.name) and not {*methods, settings.model} & {*having}:
            kind, chosen = ("model", settings.model) if having[0] in MODELS else ("method", ", ".join(methods))
            value = getattr(settings, field.name)
            whose = f"a setting of --{kind} {' and '.join(having)}, not of {chosen}"
            if PRESETS.get(settings.preset or "", {}).get(field.name) == value:
                raise SettingsError(
                    f"--preset {settings.preset} sets {flag(field.name)}, {whose}. Choose {' or '.join(having)}, or "
                    "drop --preset."
                )
            words = "" if value is True else f" {text(value)}"
            raise SettingsError(f"{flag(field.name)}{words} is {whose}. Drop the flag.")


def _check_cards(settings: SharedSettings, methods: Sequence[str]) -> None:
    """A model that a method cannot train is an error, and so is a setting that means nothing to any of the methods."""
    cards = [METHODS[method] for method in methods]
    for method, card in zip(methods, cards, strict=True):
        if card.models and settings.model not in card.models:
            raise SettingsError(
                f"--method {method} trains dense networks only, --model {' or '.join(card.models)}, and not "
                f"{settings.model}. Use such a model, or another method."
            )
    of_preset = PRESETS.get(settings.preset or "", {})
    for name, why in cards[0].without.items() if cards else ():
        value, default = getattr(settings, name, None), getattr(type(settings), name, None)
        if value and value not in (default, of_preset.get(name)) and all(name in card.without for card in cards):
            raise SettingsError(f"{flag(name)} {text(value)} means nothing to {methods[0]}: {why}. Drop the flag.")


OF_CHOICES = (
    ("optimizer", "sgd", ("momentum", "nesterov", "spike_compensation")),
    ("optimizer", "nadam", ("late_b1",)),
    ("schedule", "steps", ("milestones",)),
)
"""Settings that belong to one optimizer or schedule."""


def _check_optimizer(settings: SharedSettings, methods: Sequence[str]) -> None:
    """The settings of one optimizer or schedule are errors for the others, unless they are set by default."""
    of_preset = PRESETS.get(settings.preset or "", {})
    for owner, own, names in OF_CHOICES:
        chosen = getattr(settings, owner)
        for name in names:
            value, default = getattr(settings, name), getattr(SharedSettings, name)
            # The last ones are in the config.json of every run of a method that has the setting.
            defaults = (default, of_preset.get(name, default), *(METHODS[one].defaults.get(name) for one in methods))
            if chosen != own and value and value not in defaults:
                words = "" if value is True else f" {text(value)}"
                raise SettingsError(
                    f"{flag(name)}{words} is a setting of --{owner} {own}, not of {chosen}. Drop the flag."
                )
    if given(settings, "spike_compensation") and (settings.nesterov or not settings.momentum):
        without = "--nesterov is a form of it" if settings.nesterov else "--momentum 0 leaves it nothing to do"
        raise SettingsError(f"--spike-compensation makes up for missed momentum, and {without}. Drop one of them.")


def check(settings: TrainSettings) -> None:
    """Checks what can be checked before the data are read.

    Raises:
      SettingsError: for the first setting that cannot be used.
    """
    check_shared(settings, (settings.method,))
    if settings.resume and settings.overwrite:
        raise SettingsError("--resume and --overwrite were both given; one continues a run, the other deletes it.")
    check_cuts(settings.cuts, settings.K)
    own = own_of_method(settings, settings.method)
    if METHODS[settings.method].whole and settings.K > 1:
        raise SettingsError(f"--method {settings.method} does not cut the network into --K {settings.K}. Use --K 1.")
    METHODS[settings.method].check(own, settings.K)
    if settings.shard_params and settings.data_parallel == 1:
        raise SettingsError(
            "--shard-params splits the weights of a stage over its --data-parallel devices, and there is 1. Use "
            "--data-parallel 2 or more, or drop --shard-params."
        )
    if settings.dataset != "auto" or _batch_size(settings, "digits") == _batch_size(settings, "auto"):
        _check_split(_batch_size(settings, settings.dataset), own.get("microbatches", 1), settings.data_parallel)
    rates = settings.stage_learning_rates
    if rates is not None and len(rates) != settings.K:
        raise SettingsError(f"--stage-learning-rates {text(rates)}: give one for each of the --K {settings.K} stages.")


def check_cuts(cuts: Sequence[int] | None, K: int) -> None:
    """Raises SettingsError if explicit cuts do not make K stages."""
    if cuts is not None and len(cuts) != K - 1:
        raise SettingsError(
            f"--cuts {text(cuts)} make {len(cuts) + 1} stages, and --K is {K}; K stages need K-1 = {K - 1} "
            f"cuts. Give that many, or --K {len(cuts) + 1}."
        )


def check_parts(batch_size: int, parts: int, method: str) -> None:
    """Raises SettingsError if a method cannot split the mini-batch as it must."""
    if batch_size % parts:
        raise SettingsError(
            f"--batch-size {batch_size} cannot be split into the {parts} equal parts of {method}. Change it, or leave "
            f"{method} out."
        )


def check_own(settings: SharedSettings, method: str, K: int) -> None:
    """Raises SettingsError if a method's own settings do not suit each other, K stages, or the mini-batch."""
    own = own_of_method(settings, method)
    if METHODS[method].whole:
        raise SettingsError(f"{method} trains the network in one piece: there are no stages to look at. Leave it out.")
    METHODS[method].check(own, K)
    check_parts(settings.batch_size or 1, own.get("microbatches", 1), method)


def resolve(settings: TrainSettings, dataset: str, examples: int) -> Resolved:
    """The settings of a run on a data set: checked against the data, every default filled in.

    Args:
      settings: as given.
      dataset: the data set's name.
      examples: how many examples the training set has.

    Raises:
      SettingsError: a setting cannot be used, a mini-batch is larger than the training set or cannot be split as it
        must be.
    """
    check(settings)
    card, own = METHODS[settings.method], own_of_method(settings, settings.method)
    batch_size = examples if card.full_batch else _batch_size(settings, dataset)
    if card.full_batch and settings.batch_size not in (None, examples):
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be used: {settings.method} has all {examples:,} training "
            "examples in every step. Drop the flag."
        )
    if card.full_batch and examples % settings.data_parallel:
        raise SettingsError(
            f"--data-parallel {settings.data_parallel} does not divide the {examples:,} training examples, which "
            f"{settings.method} has all in every step. Use --data-parallel 1."
        )
    if batch_size > examples:
        raise SettingsError(
            f"--batch-size {batch_size} is too large; it must be at most the {examples:,} training examples. "
            f"Try {examples}."
        )
    _check_split(batch_size, own.get("microbatches", 1), settings.data_parallel)
    steps_per_epoch = examples // batch_size
    epochs = settings.epochs or (50 if card.full_batch else {"digits": 15, "mnist": 5}.get(dataset, 1))
    steps = settings.steps or epochs * steps_per_epoch
    milestones = settings.milestones if settings.schedule == "steps" and "schedule" not in card.without else ()
    if milestones is None:
        milestones = tuple(round(share * steps / steps_per_epoch, 6) for share in (1 / 2, 3 / 4))
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainSettings)}
    values |= own | own_of_model(settings)
    values |= {
        "dataset": dataset,
        "batch_size": batch_size,
        "steps": steps,
        "epochs": None,
        "milestones": tuple(float(milestone) for milestone in milestones),
        "learning_rate": _learning_rate(settings),
        "workdir": settings.workdir or default_workdir(settings, dataset),
        "eval_every": settings.eval_every or steps_per_epoch,
        "checkpoint_every": settings.checkpoint_every or (10 if card.full_batch else min(steps_per_epoch, 200)),
    }
    return Resolved(**values)


def _batch_size(settings: TrainSettings, dataset: str) -> int:
    usual = MODEL_CARDS[settings.model].batch_size if settings.model in MODEL_CARDS else None
    return settings.batch_size or usual or (64 if dataset == "digits" else 128)


def _check_split(batch_size: int, microbatches: int, data_parallel: int) -> None:
    parts = microbatches * data_parallel
    if microbatches > 1 and batch_size % parts:
        raise SettingsError(
            f"a mini-batch of {batch_size} cannot be split into {parts} equal parts, --microbatches times "
            f"--data-parallel; --batch-size must be a multiple of {parts}. Try {max(1, batch_size // parts) * parts}."
        )


def _learning_rate(settings: TrainSettings) -> float:
    """Stale gradients need a smaller step of SGD; with K = 1 nothing is stale."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    if settings.optimizer != "sgd":
        return ADAPTIVE_RATE
    card = METHODS[settings.method]
    rate = METHODS["bp"].learning_rate if settings.K == 1 and card.alone_bp else card.learning_rate
    return rate / MODEL_CARDS[settings.model].rate_divisor if settings.model in MODEL_CARDS else rate


def default_workdir(settings: TrainSettings, dataset: str) -> Path:
    """``runs/<data set>-<model>-<method>-K<K>-seed<seed>``."""
    run = f"{dataset}-{settings.model}-{settings.method}-K{settings.K}-seed{settings.seed}"
    return Path("runs") / f"{settings.FOLDER_PREFIX}{run}"


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that enter the mathematics and differ between a saved run and this call, as readable text."""
    fixed = [field.name for field in dataclasses.fields(TrainSettings) if not guard(field).free]
    if now["schedule"] == "cosine":
        fixed.append("steps")
    names = [name for name in fixed if not owners(name) or belongs(name, now["method"], now["model"])]
    # A setting that the saved run did not know had the value that is its default today.
    own = METHODS[now["method"]].defaults | (MODEL_CARDS[now["model"]].defaults if now["model"] in MODEL_CARDS else {})
    old = {name: from_json(saved, name) for name in names} | {"resolved_cuts": saved.get("resolved_cuts")}
    old = {name: own.get(name) if value is None else value for name, value in old.items()}
    texts = {
        name: f"{flag(name)} is {text(now.get(name))} and was {text(value)}"
        for name, value in old.items()
        if value != now.get(name)
    }
    checksums = [config.get("data_checksum") for config in (saved, now)]
    if None not in checksums and checksums[0] != checksums[1]:
        texts["text"] = f"the text is another than it was (CRC32 {checksums[1]:08x} and was {checksums[0]:08x})"
    if list(texts) == ["milestones"]:
        texts["milestones"] += f" (to train for longer, add --milestones {text(saved['milestones'])})"
    if "K" in texts:
        texts.pop("resolved_cuts", None)  # they follow from K
        texts["K"] += " (to go on with another K, start a run in another folder with --init-from this one)"
    if "steps" in texts:
        texts["steps"] += " (the length of the run sets the learning rates of --schedule cosine)"
    return list(texts.values())
