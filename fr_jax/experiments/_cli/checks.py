"""What the settings of a run must fulfil, what fills them up, and what may change when a run is resumed."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fr_jax.data.image_sets import DATASETS
from fr_jax.experiments._cli.settings import (
    PRESETS,
    SettingsError,
    SharedSettings,
    TrainSettings,
    flag,
    from_json,
    given,
)
from fr_jax.experiments._methods import METHODS, MODEL_SETTINGS, own_defaults, own_settings, owners
from fr_jax.models import MODELS

__all__ = [
    "check",
    "check_cuts",
    "check_fit",
    "check_parts",
    "check_shared",
    "choice",
    "default_batch_size",
    "default_workdir",
    "differences",
    "resolve",
]

DTYPES = ("float32", "bfloat16")
BALANCES = ("flops", "time", "uniform")
BATCH_STATS = ("play", "replay", "both")
LARGEST_SEED = 2**32 - 1  # jax.random.key takes larger ones for others, without a word

HOW_NOT_WHAT = frozenset(
    {
        "balance",
        "checkpoint_every",
        "compilation_cache",
        "coordinator",
        "cuts",
        "data_dir",
        "devices",
        "distributed",
        "epochs",
        "eval_every",
        "heartbeat",
        "log_every",
        "num_processes",
        "overwrite",
        "preset",
        "process_id",
        "profile",
        "resume",
        "steps",
        "tensorboard",
        "workdir",
    }
)
"""Settings that may differ when a run is resumed: they do not enter the mathematics of a step."""

AT_LEAST = {
    "K": 1,
    "batch_size": 1,
    "steps": 1,
    "epochs": 1,
    "data_parallel": 1,
    "devices": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "log_every": 1,
    "heartbeat": 2,
    "depth": 1,
    "width": 1,
    "accumulate": 1,
    "synthesizer_hidden": 1,
    "h_every": 1,
    "microbatches": 1,
    "h_steps": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "momentum": 0,
    "seed": 0,
    "dropout_rate": 0,
    "gradient_shrinking": 0,
    "weight_prediction": 0,
    "synthesizer_learning_rate": 0,
    "penalty": 0,
    "h_learning_rate": 0,
}


def choice(name: str, value: str, valid: Iterable[str]) -> None:
    """Raises SettingsError where ``value`` is not one of those that ``--name`` can have."""
    if value not in valid:
        close = difflib.get_close_matches(str(value), valid, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingsError(f"{flag(name)} {value} is unknown; it can be {', '.join(valid)}.{hint}")


def _check_ranges(settings: SharedSettings) -> None:
    for name, least in AT_LEAST.items():
        value = getattr(settings, name, None)
        if isinstance(value, int | float) and not least <= value < math.inf:  # tuples are checked run by run
            raise SettingsError(f"{flag(name)} {value} is out of range; it must be at least {least}, and finite.")
    if settings.dropout_rate is not None and settings.dropout_rate >= 1:
        raise SettingsError(f"--dropout-rate {settings.dropout_rate} is out of range; it must be below 1.")
    if settings.gradient_shrinking is not None and not 0 < settings.gradient_shrinking <= 1:
        raise SettingsError(
            f"--gradient-shrinking {settings.gradient_shrinking} is out of range; it must be above 0 and at most 1, "
            "which is none."
        )
    if any(not 0 <= milestone < math.inf for milestone in settings.milestones or ()):
        text = _text(list(settings.milestones or ()))
        raise SettingsError(f"--milestones {text} holds what is no epoch, 0 or more; drop it.")


def _check_owners(settings: SharedSettings, methods: Sequence[str]) -> None:
    """A setting that neither the model nor one of the methods has is an error, not ignored."""
    for field in dataclasses.fields(settings):
        belongs_to = owners(field.name)
        if belongs_to and given(settings, field.name) and not {*methods, settings.model} & {*belongs_to}:
            kind, chosen = ("model", settings.model) if belongs_to[0] in MODELS else ("method", ", ".join(methods))
            value = getattr(settings, field.name)
            if PRESETS.get(settings.preset or "", {}).get(field.name) == value:
                raise SettingsError(
                    f"--preset {settings.preset} sets {flag(field.name)}, a setting of --{kind} "
                    f"{' and '.join(belongs_to)}, not of {chosen}. Choose {' or '.join(belongs_to)}, or drop --preset."
                )
            raise SettingsError(
                f"{flag(field.name)}{'' if value is True else f' {value}'} is a setting of --{kind} "
                f"{' and '.join(belongs_to)}, not of {chosen}. Drop the flag."
            )


def check_shared(settings: SharedSettings, methods: Iterable[str]) -> None:
    """Checks what runs by the given methods have in common.

    Raises:
      SettingsError: for the first setting that cannot be used.
    """
    methods = tuple(methods)
    for method in methods:
        choice("method", method, METHODS)
    choice("model", settings.model, MODELS)
    choice("dtype", settings.dtype, DTYPES)
    choice("balance", settings.balance, BALANCES)
    choice("dataset", settings.dataset, DATASETS)
    if settings.batch_stats is not None:
        choice("batch_stats", settings.batch_stats, BATCH_STATS)
    if settings.preset is not None:
        choice("preset", settings.preset, PRESETS)
    _check_ranges(settings)
    _check_owners(settings, methods)
    if settings.h_every is not None and settings.h_every > 1 and not settings.cache:
        raise SettingsError(
            f"--h-every {settings.h_every} needs the gluing variables of earlier visits. Add --cache, or drop the flag."
        )
    if settings.steps is not None and settings.epochs is not None:
        raise SettingsError("--steps and --epochs were both given; a run has one length. Drop one of them.")
    if settings.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise SettingsError("--tensorboard needs tensorboardX: pip install 'fr_jax[tensorboard]', or drop the flag.")


def check(settings: TrainSettings) -> None:
    """Checks what can be checked before the data are read.

    Raises:
      SettingsError: for the first setting that cannot be used.
    """
    check_shared(settings, (settings.method,))
    if settings.seed > LARGEST_SEED:
        raise SettingsError(f"--seed {settings.seed} is out of range; it must be at most {LARGEST_SEED} (32 bits).")
    if settings.resume and settings.overwrite:
        raise SettingsError("--resume and --overwrite were both given; one continues a run, the other deletes it.")
    check_cuts(settings.cuts, settings.K)


def check_cuts(cuts: Sequence[int] | None, K: int) -> None:
    """Raises SettingsError where explicit cuts do not make K stages."""
    if cuts is not None and len(cuts) != K - 1:
        raise SettingsError(
            f"--cuts {_text(list(cuts))} make {len(cuts) + 1} stages, and --K is {K}; K stages need K-1 = {K - 1} "
            f"cuts. Give that many, or --K {len(cuts) + 1}."
        )


def check_parts(batch_size: int, parts: int, method: str) -> None:
    """Raises SettingsError where a method cannot split the mini-batch as it must."""
    if batch_size % parts:
        raise SettingsError(
            f"--batch-size {batch_size} cannot be split into the {parts} equal parts of {method}. Change it, or leave "
            f"{method} out."
        )


def check_fit(settings: TrainSettings, dataset: str, examples: int) -> None:
    """Checks what depends on the data alone, before anything is built.

    Raises:
      SettingsError: a mini-batch is larger than the training set, or cannot be split as it must be.
    """
    batch_size = default_batch_size(settings, dataset)
    if batch_size > examples:
        raise SettingsError(
            f"--batch-size {batch_size} is too large; it must be at most the {examples:,} training examples. "
            f"Try {examples}."
        )
    parts = own_settings(settings, settings.method).get("microbatches", 1) * settings.data_parallel
    if parts > settings.data_parallel and batch_size % parts:
        raise SettingsError(
            f"a mini-batch of {batch_size} cannot be split into {parts} equal parts, --microbatches times "
            f"--data-parallel; --batch-size must be a multiple of {parts}. Try {max(1, batch_size // parts) * parts}."
        )


def resolve(settings: TrainSettings, dataset: str, batch_size: int, steps_per_epoch: int) -> TrainSettings:
    """Fills in the defaults; nothing but paths and the settings of other methods and models is None afterwards."""
    steps = settings.steps
    if steps is None:
        steps = (settings.epochs or {"digits": 15, "mnist": 5}.get(dataset, 1)) * steps_per_epoch
    epochs = steps / steps_per_epoch
    milestones = settings.milestones
    if milestones is None:
        milestones = (round(epochs / 2, 6), round(epochs * 3 / 4, 6))
    return dataclasses.replace(
        settings,
        dataset=dataset,
        batch_size=batch_size,
        steps=steps,
        epochs=None,
        milestones=tuple(float(m) for m in milestones),
        learning_rate=default_learning_rate(settings),
        workdir=settings.workdir or default_workdir(settings, dataset),
        eval_every=settings.eval_every or steps_per_epoch,
        checkpoint_every=settings.checkpoint_every or min(steps_per_epoch, 200),
        **own_settings(settings, settings.method),
    )


def default_batch_size(settings: SharedSettings, dataset: str) -> int:
    """Smaller mini-batches for the small data set, so that an epoch has some."""
    return settings.batch_size or (64 if dataset == "digits" else 128)


def default_learning_rate(settings: TrainSettings) -> float:
    """Stale gradients bear a smaller step, and so does a network without batch normalisation."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    rate = METHODS[settings.method if settings.K > 1 else "bp"].learning_rate
    return rate / 5 if settings.model in MODEL_SETTINGS else rate


def default_workdir(settings: TrainSettings, dataset: str) -> Path:
    """``runs/<data set>-<model>-<method>-K<K>-seed<seed>``."""
    run = f"{dataset}-{settings.model}-{settings.method}-K{settings.K}-seed{settings.seed}"
    return Path("runs") / f"{settings.FOLDER_PREFIX}{run}"


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that enter the mathematics and differ between a saved run and this call, as readable text."""
    names = [field.name for field in dataclasses.fields(TrainSettings) if field.name not in HOW_NOT_WHAT]
    chosen = {now["method"], now["model"]}
    names = [name for name in names if not owners(name) or chosen & {*owners(name)}]
    # Where the saved run knew nothing of a setting, it did what is the default today.
    own = own_defaults(now["method"], now["model"])
    old = {name: from_json(saved, name) for name in names} | {"resolved_cuts": saved.get("resolved_cuts")}
    old = {name: own.get(name) if value is None else value for name, value in old.items()}
    texts = {
        name: f"{flag(name)} is {_text(now.get(name))} and was {_text(value)}"
        for name, value in old.items()
        if value != now.get(name)
    }
    if list(texts) == ["milestones"]:
        texts["milestones"] += f" (to train for longer, add --milestones {_text(saved['milestones'])})"
    return list(texts.values())


def _text(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
