"""The settings of a training run: flags, defaults, presets, and checks."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fr_jax.models import MODELS
from fr_jax.training.data import DATASETS

__all__ = [
    "METHODS",
    "PRESETS",
    "SettingsError",
    "TrainSettings",
    "as_json",
    "check",
    "default_batch_size",
    "default_workdir",
    "differences",
    "flag",
    "resolve",
]

METHODS = {"fr": "features replay", "bp": "back-propagation"}
DTYPES = ("float32", "bfloat16")
BALANCES = ("flops", "time", "uniform")
BATCH_STATS = ("play", "replay", "both")
LARGEST_SEED = 2**32 - 1  # jax.random.key takes larger ones for others, without a word


class SettingsError(ValueError):
    """A setting that cannot be used; the message says what was given, what is valid and what to do."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Train an image classifier as K decoupled modules, one device each.

    Results go to a folder of their own (--workdir): config.json, metrics.jsonl, curves.png, summary.json, checkpoints/.
    """

    K: int = 4
    """Number of modules (stages); 1 is plain back-propagation."""
    method: str = "fr"
    """fr (features replay) or bp (back-propagation)."""
    model: str = "resnet20"
    """resnet20, 32, 56, 110, 164 (6n+2, the paper's), resnet18, 50, 101, 152, wrn28_10, or mlp."""
    dataset: str = "auto"
    """cifar10, cifar100, digits, synthetic, or auto: CIFAR-10 where it is found or can be fetched, else digits."""
    data_dir: Path | None = None
    """Folder with the official binary files or their .tar.gz, or a TFDS folder."""
    epochs: int | None = None
    """Passes over the training set. Default: 15 for digits, 1 otherwise; a few minutes on two CPU cores."""
    steps: int | None = None
    """Mini-batches to train for, instead of epochs."""
    batch_size: int | None = None
    """Examples of a mini-batch, over all devices of a stage. Default: 64 for digits, 128 otherwise."""
    learning_rate: float | None = None
    """Initial step size. Default: 0.1 for bp, 0.05 for fr, whose stale gradients bear less."""
    milestones: tuple[float, ...] | None = None
    """Epochs after which the learning rate is divided by 10. Default: at 1/2 and 3/4 of the run."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum (the paper's authors used it in their code)."""
    weight_decay: float = 5e-4
    """Added to the gradient, times the weight."""
    seed: int = 0
    """Of the initial weights, the order of the data, augmentation and dropout."""
    dtype: str = "float32"
    """Of the computation: float32 or bfloat16; parameters are float32 always."""
    balance: str = "flops"
    """How to cut the network: flops, time (measured here), or uniform (equal numbers of layers)."""
    cuts: tuple[int, ...] | None = None
    """Explicit cuts instead: K-1 increasing layer numbers, each the first layer (from 0) of the next stage."""
    data_parallel: int = 1
    """Devices of each stage, which share every mini-batch."""
    batch_stats: str = "play"
    """When fr moves batch-norm running statistics: in play, replay, or both (as the authors' code)."""
    devices: int | None = None
    """Devices to use; stages share them round robin. Default: K x data-parallel, or all there are if fewer."""
    workdir: Path | None = None
    """Folder of the run. Default: runs/<data set>-<model>-<method>-K<K>-seed<seed>."""
    resume: bool = False
    """Continue the run in the folder from its newest checkpoint."""
    overwrite: bool = False
    """Delete the run that the folder holds, and start again."""
    eval_every: int | None = None
    """Steps between evaluations on the test set. Default: an epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: an epoch, but no more than 200."""
    log_every: int = 10
    """Steps averaged in one training row of metrics.jsonl."""
    preset: str | None = None
    """paper: ResNet164 on CIFAR-10, 300 epochs, lr 0.01, /10 at 150 and 225, batch 128. Other flags still win."""
    profile: bool = False
    """Write a jax.profiler trace of ten steps to the folder's profile/."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra: pip install 'fr_jax[tensorboard]')."""


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "model": "resnet164",
        "dataset": "cifar10",
        "epochs": 300,
        "batch_size": 128,
        "learning_rate": 0.01,
        "milestones": (150, 225),
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
}

HOW_NOT_WHAT = frozenset(
    {
        "balance",
        "checkpoint_every",
        "cuts",
        "data_dir",
        "devices",
        "epochs",
        "eval_every",
        "log_every",
        "overwrite",
        "preset",
        "profile",
        "resume",
        "steps",
        "tensorboard",
        "workdir",
    }
)
"""Settings that may differ when a run is resumed: they do not enter the mathematics of a step."""


def _choice(settings: TrainSettings, name: str, valid: Iterable[str]) -> None:
    value = getattr(settings, name)
    if value not in valid:
        close = difflib.get_close_matches(str(value), valid, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingsError(f"{flag(name)} {value} is unknown; it can be {', '.join(valid)}.{hint}")


def _at_least(settings: TrainSettings, name: str, least: float) -> None:
    value = getattr(settings, name)
    if value is not None and not value >= least:
        raise SettingsError(f"{flag(name)} {value} is out of range; it must be at least {least}.")


def check(settings: TrainSettings) -> None:
    """Checks what can be checked before the data are read.

    Raises:
      SettingsError: for the first setting that cannot be used.
    """
    _choice(settings, "method", METHODS)
    _choice(settings, "model", MODELS)
    _choice(settings, "dtype", DTYPES)
    _choice(settings, "balance", BALANCES)
    _choice(settings, "batch_stats", BATCH_STATS)
    _choice(settings, "dataset", DATASETS)
    if settings.preset is not None:
        _choice(settings, "preset", PRESETS)
    for name in ("K", "batch_size", "steps", "epochs", "data_parallel", "devices"):
        _at_least(settings, name, 1)
    for name in ("eval_every", "checkpoint_every", "log_every"):
        _at_least(settings, name, 1)
    for name in ("learning_rate", "weight_decay", "momentum", "seed"):
        _at_least(settings, name, 0)
    if settings.seed > LARGEST_SEED:
        raise SettingsError(f"--seed {settings.seed} is out of range; it must be at most {LARGEST_SEED} (32 bits).")
    if any(not milestone >= 0 for milestone in settings.milestones or ()):
        raise SettingsError(f"--milestones {_text(list(settings.milestones or ()))} holds an epoch below 0; drop it.")
    if settings.steps is not None and settings.epochs is not None:
        raise SettingsError("--steps and --epochs were both given; a run has one length. Drop one of them.")
    if settings.resume and settings.overwrite:
        raise SettingsError("--resume and --overwrite were both given; one continues a run, the other deletes it.")
    if settings.batch_stats != "play" and settings.method != "fr":
        raise SettingsError(
            f"--batch-stats {settings.batch_stats} is a setting of --method fr; {settings.method} has one forward "
            "pass. Drop the flag."
        )
    if settings.cuts is not None and len(settings.cuts) != settings.K - 1:
        raise SettingsError(
            f"--cuts has {len(settings.cuts)} positions for --K {settings.K}; "
            f"K stages need K-1 = {settings.K - 1} cuts."
        )
    if settings.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise SettingsError("--tensorboard needs tensorboardX: pip install 'fr_jax[tensorboard]', or drop the flag.")


def resolve(settings: TrainSettings, dataset: str, batch_size: int, steps_per_epoch: int) -> TrainSettings:
    """Fills in the defaults that depend on the data set; nothing but paths is None afterwards."""
    default_epochs = 15 if dataset == "digits" else 1
    steps = settings.steps
    if steps is None:
        steps = (settings.epochs or default_epochs) * steps_per_epoch
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
    )


def default_batch_size(settings: TrainSettings, dataset: str) -> int:
    """Smaller mini-batches for the small data set, so that an epoch has some."""
    return settings.batch_size or (64 if dataset == "digits" else 128)


def default_learning_rate(settings: TrainSettings) -> float:
    """Stale gradients bear a smaller step."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return 0.05 if settings.method == "fr" and settings.K > 1 else 0.1


def default_workdir(settings: TrainSettings, dataset: str) -> Path:
    """``runs/<data set>-<model>-<method>-K<K>-seed<seed>``."""
    return Path("runs") / f"{dataset}-{settings.model}-{settings.method}-K{settings.K}-seed{settings.seed}"


def as_json(settings: TrainSettings) -> dict[str, Any]:
    """The settings as JSON holds them, for ``config.json``."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that enter the mathematics and differ between a saved run and this call, as readable text."""
    names = [field.name for field in dataclasses.fields(TrainSettings) if field.name not in HOW_NOT_WHAT]
    names.append("resolved_cuts")
    different = [name for name in names if saved.get(name) != now.get(name)]
    texts = [f"{flag(name)} is {_text(now.get(name))} and was {_text(saved.get(name))}" for name in different]
    if different == ["milestones"]:
        texts[0] += f" (to train for longer, add --milestones {_text(saved['milestones'])})"
    return texts


def flag(name: str) -> str:
    """``data_dir`` -> ``--data-dir``."""
    return f"--{name.removeprefix('resolved_').replace('_', '-')}"


def _text(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
