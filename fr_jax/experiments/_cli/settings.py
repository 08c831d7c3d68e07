"""The settings of a training run: one field per flag, with its guards; a method's and a model's own from the cards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fr_jax.experiments._fields import LARGEST_SEED, documented, guard, own_fields, setting
from fr_jax.experiments._methods import METHODS, Method, listed
from fr_jax.experiments._models import MODEL_CARDS, ModelCard
from fr_jax.models import MODELS

__all__ = [
    "BUBBLE_FREE",
    "PRESETS",
    "CommonSettings",
    "ModelSettings",
    "OwnSettings",
    "ProcessSettings",
    "Resolved",
    "RunSettings",
    "SharedSettings",
    "TrainSettings",
    "as_json",
    "belongs",
    "from_json",
    "given",
    "own_of_method",
    "own_of_model",
    "owners",
    "titled",
]

BUBBLE_FREE: dict[str, Any] = {"method": "ddg", "microbatches": 4, "weight_prediction": 1.0}
"""The recipe of experiments/time-to-loss: as many micro-batches as the usual K, and predicted weights."""

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
    },
    "blockprop": {
        "method": "blockprop",
        "K": 2,
        "model": "mlp",
        "depth": 2,
        "dataset": "mnist",
        "penalty": 1.0,
        "h_steps": 4,
    },
    "bubble-free": BUBBLE_FREE
    | {
        "model": "resnet20",
        "dataset": "cifar10",
        "epochs": 12,
        "learning_rate": 0.1,
        "warmup": 391,
    },
}

LANGUAGE_MODEL: dict[str, Any] = {
    "model": "gpt",
    "weight_decay": 0.1,
    "schedule": "cosine",
    "clip": 1.0,
}
PRESETS["lm"] = LANGUAGE_MODEL | {
    "optimizer": "muon",
    "width": 64,
    "steps": 1000,
    "batch_size": 16,
    "learning_rate": 0.012,
    "warmup": 200,
    "eval_every": 100,
    "test_examples": 512,
}
PRESETS["gpt2"] = LANGUAGE_MODEL | {
    "optimizer": "adamw",
    "depth": 18,
    "width": 768,
    "heads": 12,
    "context": 1024,
    "dtype": "bfloat16",
    "steps": 20_000,
    "batch_size": 64,
    "learning_rate": 0.0006,
    "warmup": 1000,
    "eval_every": 500,
    "test_examples": 256,
}

ADAPTIVE_RATE = 0.001
"""Default learning rate of adamw, nadam and muon, for every method and model."""


def _default_rates() -> str:
    """Such as ``0.05 for fr, ddg; 0.1 for bp; divided by 5 for mlp``."""
    rates: dict[float, list[str]] = {}
    for name, card in METHODS.items():
        rates.setdefault(card.learning_rate, []).append(name)
    of_methods = [f"{rate:g} for {', '.join(names)}" for rate, names in rates.items()]
    divisors = {name: card.rate_divisor for name, card in MODEL_CARDS.items() if card.rate_divisor != 1}
    of_models = [f"divided by {divisor:g} for {name}" for name, divisor in divisors.items()]
    return f"Default with sgd: {'; '.join(of_methods + of_models)}; with adamw, nadam and muon: {ADAPTIVE_RATE}."


@documented
@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Which run of a comparison."""

    K: int = setting(4, least=1)
    """Number of stages; 1 is plain back-propagation."""
    method: str = setting("fr", choices=tuple(METHODS), help=f"{listed()}.")
    seed: int = setting(0, least=0, most=LARGEST_SEED)
    """Of the initial weights, the order of the data, augmentation and dropout."""
    cuts: tuple[int, ...] | None = setting(None, free="resume")
    """Where to cut, instead of --balance: K-1 increasing layer numbers, each the first layer (from 0) of a stage."""
    stage_learning_rates: tuple[float, ...] | None = setting(None, least=0)
    """Initial step size of each stage, K numbers, instead of one --learning-rate for all."""
    workdir: Path | None = setting(None, free="process")
    """Folder of the run. Default: runs/<data set>-<model>-<method>-K<K>-seed<seed>."""
    resume: bool = setting(False, free="resume")
    """Continue the run in the folder from its newest checkpoint."""
    overwrite: bool = setting(False, free="process")
    """Delete the run that the folder holds, and start again."""
    init_from: Path | None = setting(None, free="resume")
    """Folder of a run of the same network with any K: go on from its newest checkpoint, in a folder of this run."""


@documented
@dataclasses.dataclass(frozen=True)
class CommonSettings:
    """What all runs of a comparison have in common, whatever their method."""

    model: str = setting("resnet20", choices=tuple(MODELS), vary=False)
    """resnet8, 20, 32, 56, 110, 164 (6n+2, the paper's), resnet18, 50, 101, 152, wrn28_10, mlp; gpt reads text."""
    dataset: str = setting("auto", vary=False)
    """cifar10, cifar100, mnist, digits, synthetic, npy (images of your own in --data-dir: train_images.npy,
    train_labels.npy, and test_...), or auto: the program's own where found or fetched, else digits.
    For gpt: python (its standard library's source code), text (that of --text), or auto."""
    data_dir: Path | None = setting(None, free="process", vary=False)
    """Folder with the official files (CIFAR: .bin or .tar.gz, MNIST: idx or .gz), or a TFDS folder."""
    text: tuple[Path, ...] | None = setting(None, free="process", vary=False, owners=("gpt",))
    """[gpt] UTF-8 files to train on, and folders of such files, instead of Python's standard library."""
    prompt: str | None = setting(None, free="process", vary=False, owners=("gpt",))
    """[gpt] Beginning of the text that the model writes after training. Default: 'def ' for python, else a new line."""
    temperature: float | None = setting(None, least=0, free="process", vary=False, owners=("gpt",))
    """[gpt] Of that text: 1 draws bytes as likely as the model finds them, 0 takes the likeliest. Default: 0.8."""
    sample_bytes: int | None = setting(None, least=0, free="process", vary=False, owners=("gpt",))
    """[gpt] Length of that text; 0 for none. Default: 400."""
    epochs: int | None = setting(None, least=1, free="resume")
    """Passes over the training set. Default: 15 for digits, 5 for MNIST, 50 for admm, else 1; minutes on two cores."""
    steps: int | None = setting(None, least=1, free="resume")
    """Mini-batches to train for, instead of epochs."""
    batch_size: int | None = setting(None, least=1)
    """Examples of a mini-batch, over all devices of a stage. Default: 64 for digits, 16 for gpt, else 128."""
    optimizer: str = setting("sgd", choices=("sgd", "adamw", "nadam", "muon"))
    """sgd, adamw, nadam (Nesterov's Adam, with more momentum for late stages), or muon: orthogonalized updates for
    dense and convolution kernels (as matrices of height x width x inputs by outputs), Adam with the same learning rate
    for biases and normalization."""
    learning_rate: float | None = setting(None, least=0, help=f"Largest learning rate. {_default_rates()}")
    schedule: str = setting("steps", choices=("steps", "cosine", "constant"))
    """steps (the rate is divided by 10 at --milestones), cosine (it falls to 0 at the end of the run), or constant."""
    warmup: int = setting(0, least=0)
    """Mini-batches over which the learning rate rises linearly from 0; cosine starts to fall after them."""
    milestones: tuple[float, ...] | None = setting(None, least=0, vary=False)
    """[schedule steps] Epochs after which the rate is divided by 10. Default: at 1/2 and 3/4 of the run."""
    momentum: float = setting(0.9, least=0, most=1)
    """[sgd] Momentum."""
    nesterov: bool = setting(False)
    """[sgd] Nesterov's form of momentum (the paper's authors used it in their code)."""
    weight_decay: float = setting(5e-4, least=0)
    """Times the weight: added to the gradient with sgd; decoupled with the others (times the learning rate)."""
    clip: float | None = setting(None, above=0)
    """Largest norm of each stage's gradient; a larger gradient is scaled down to it. Default: no clipping."""
    skip_nonfinite: bool = setting(True)
    """After a mini-batch with a loss or gradient that is not finite go on: each stage drops its update, and a row of
    metrics.jsonl counts it. A run of ten such steps has diverged; with --no-skip-nonfinite the first one ends it."""
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Of the computation: float32 or bfloat16; parameters are always float32."""
    balance: str = setting("flops", choices=("flops", "time", "uniform"), free="resume")
    """How to cut the network: flops, time (measured here), or uniform (equal numbers of layers)."""
    data_parallel: int = setting(1, least=1)
    """Devices of each stage, which share every mini-batch."""
    shard_params: bool = setting(False, free="resume")
    """With --data-parallel D: each device of a stage keeps 1/D of its weights and of the optimizer's state."""
    devices: int | None = setting(None, least=1, free="resume", vary=False)
    """Devices to use; stages share them round robin. Default: K x data-parallel, or all there are if fewer."""
    eval_every: int | None = setting(None, least=1, free="resume", vary=False)
    """Steps between evaluations on the test set. Default: an epoch."""
    test_examples: int | None = setting(None, least=1, vary=False)
    """Evaluate on the first so many test examples, or so many windows of the held-out text, only. Default: all."""
    checkpoint_every: int | None = setting(None, least=1, free="resume", vary=False)
    """Steps between checkpoints. Default: an epoch, but no more than 200."""
    compilation_cache: str = setting("auto", free="process", vary=False)
    """Folder where compiled code is kept for the next start; auto: in the user's cache folder; none: nowhere."""
    log_every: int = setting(10, least=1, free="resume", vary=False)
    """Steps averaged in one training row of metrics.jsonl."""
    preset: str | None = setting(None, choices=tuple(PRESETS), free="resume", vary=False)
    """paper: ResNet164, CIFAR-10, 300 epochs, lr 0.01. blockprop: its figure 2, MNIST, one hidden layer. bubble-free:
    ResNet20, CIFAR-10, ddg, 4 micro-batches, predicted weights, lr 0.1. lm: a small gpt, the defaults of that program.
    gpt2: for a GPU, 128 million parameters, bfloat16. Flags win."""
    profile: bool = setting(False, free="process")
    """Write a jax.profiler trace of ten steps to the folder's profile/."""
    tensorboard: bool = setting(False, free="process")
    """Also write TensorBoard events (needs the extra: pip install 'fr_jax[tensorboard]')."""


def _own_settings(name: str, cards: Mapping[str, ModelCard | Method]) -> type:
    fields = own_fields({name: card.own for name, card in cards.items()})
    namespace = {"__doc__": "The settings that belong to some methods or models, from their cards."}
    return documented(dataclasses.make_dataclass(name, fields, frozen=True, namespace=namespace))


if TYPE_CHECKING:

    class OwnSettings:
        """The settings that belong to some methods or models; :func:`own_of_method` reads them."""

        def __init__(self, **own: Any) -> None: ...

    class ModelSettings(OwnSettings):
        """Those of models alone."""

else:
    OwnSettings = _own_settings("OwnSettings", {**MODEL_CARDS, **METHODS})
    ModelSettings = _own_settings("ModelSettings", MODEL_CARDS)


@dataclasses.dataclass(frozen=True)
class SharedSettings(OwnSettings, CommonSettings):
    """What all runs of a comparison have in common."""


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
    """Which process of a run of several this is; ``python -m fr_jax.launch`` makes them on one machine."""

    coordinator: str | None = setting(None, free="process")
    """HOST:PORT of process 0, for a run of several processes started by hand; stages are spread over all of them."""
    num_processes: int | None = setting(None, free="process")
    """With --coordinator: how many processes there are."""
    process_id: int | None = setting(None, free="process")
    """With --coordinator: which one this is, from 0. Process 0 prints and writes; the others need no --workdir."""
    distributed: bool = setting(False, free="process")
    """Find the other processes from SLURM, Open MPI or Kubernetes."""
    heartbeat: int = setting(60, least=2, free="process")
    """Seconds without a sign of life of one process after which the others end; 10 times as many if it is stuck."""


@dataclasses.dataclass(frozen=True)
class TrainSettings(ProcessSettings, SharedSettings, RunSettings):
    """Train a network as K decoupled stages, one device each.

    Results go to a folder of their own (--workdir): config.json, metrics.jsonl, curves.png, summary.json, checkpoints/.
    Settings marked [method] or [model] belong to these alone; given for another, they are an error.
    """

    FOLDER_PREFIX: ClassVar[str] = ""  # of the default folder, if a program does more than train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved(TrainSettings):
    """The settings of a run on its data: checked, and every default filled in (:func:`..checks.resolve`).

    None remains only where it is the value: no data folder, no preset, no explicit cuts, as many devices as there are,
    and the settings of other methods and models.
    """

    batch_size: int
    steps: int
    learning_rate: float
    milestones: tuple[float, ...]
    workdir: Path
    eval_every: int
    checkpoint_every: int


def owners(name: str) -> tuple[str, ...]:
    """The methods or models that a setting belongs to; empty if it belongs to all."""
    return next((guard(field).owners for field in dataclasses.fields(TrainSettings) if field.name == name), ())


def belongs(name: str, method: str, model: str) -> bool:
    """Whether a setting is one of a run with this method and this model."""
    return name not in METHODS[method].without and (not owners(name) or bool({method, model} & {*owners(name)}))


def given(settings: SharedSettings, name: str) -> bool:
    """Whether an optional setting was given a value: it is neither None nor an unset flag."""
    value = getattr(settings, name)
    return value is not None and value is not False


def own_of_method(settings: SharedSettings, method: str) -> dict[str, Any]:
    """The method's own settings, as given or by default."""
    return _own(settings, METHODS[method].defaults)


def own_of_model(settings: SharedSettings) -> dict[str, Any]:
    """The model's own settings, as given or by default: arguments of its factory."""
    return _own(settings, MODEL_CARDS[settings.model].defaults if settings.model in MODEL_CARDS else {})


def _own(settings: SharedSettings, defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(settings, name) if given(settings, name) else default for name, default in defaults.items()}


def titled(settings: TrainSettings) -> str:
    """Such as ``features replay, K = 4, M = 8``."""
    return METHODS[settings.method].titled(own_of_method(settings, settings.method), f", K = {settings.K}")


def as_json(settings: SharedSettings) -> dict[str, Any]:
    """The settings as JSON holds them, for ``config.json``."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def from_json(config: Mapping[str, Any], name: str) -> Any:
    """A setting from a ``config.json``; one that did not exist when it was written had what is its default now."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    if name == "stage_learning_rates" and "block_learning_rates" in config:  # BlockProp's figures of fr_jax 0.1
        rates = config["block_learning_rates"]
        return rates if len(set(rates)) > 1 else None
    return config.get(name, defaults.get(name))
