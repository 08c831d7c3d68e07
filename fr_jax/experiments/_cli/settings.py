"""The settings of a training run: one field a flag."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

__all__ = [
    "PRESETS",
    "ProcessSettings",
    "RunSettings",
    "SettingsError",
    "SharedSettings",
    "TrainSettings",
    "as_json",
    "flag",
    "given",
]


class SettingsError(ValueError):
    """A setting that cannot be used; the message says what was given, what is valid and what to do."""


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Which run of a comparison."""

    K: int = 4
    """Number of modules (stages); 1 is plain back-propagation."""
    method: str = "fr"
    """fr (features replay), bp (back-propagation), ddg, dni, blockprop or gpipe."""
    seed: int = 0
    """Of the initial weights, the order of the data, augmentation and dropout."""
    cuts: tuple[int, ...] | None = None
    """Where to cut, instead of --balance: K-1 increasing layer numbers, each the first layer (from 0) of a stage."""
    workdir: Path | None = None
    """Folder of the run. Default: runs/<data set>-<model>-<method>-K<K>-seed<seed>."""
    resume: bool = False
    """Continue the run in the folder from its newest checkpoint."""
    overwrite: bool = False
    """Delete the run that the folder holds, and start again."""


@dataclasses.dataclass(frozen=True)
class SharedSettings:
    """What all runs of a comparison have in common."""

    model: str = "resnet20"
    """resnet8, 20, 32, 56, 110, 164 (6n+2, the paper's), resnet18, 50, 101, 152, wrn28_10, or mlp."""
    depth: int | None = None
    """[mlp] Dense layers, the output layer included. Default: 6."""
    width: int | None = None
    """[mlp] Units of a hidden layer. Default: 256."""
    dropout_rate: float | None = None
    """[mlp] Of every hidden layer. Default: 0."""
    dataset: str = "auto"
    """cifar10, cifar100, mnist, digits, synthetic, or auto: the program's own where found or fetched, else digits."""
    data_dir: Path | None = None
    """Folder with the official files (CIFAR: .bin or .tar.gz, MNIST: idx or .gz), or a TFDS folder."""
    epochs: int | None = None
    """Passes over the training set. Default: 15 for digits, 5 for MNIST, 1 otherwise; minutes on two CPU cores."""
    steps: int | None = None
    """Mini-batches to train for, instead of epochs."""
    batch_size: int | None = None
    """Examples of a mini-batch, over all devices of a stage. Default: 64 for digits, 128 otherwise."""
    learning_rate: float | None = None
    """Initial step size. Default: 0.1 for bp and gpipe, 0.015 for dni, 0.05 for the others; mlp: a fifth."""
    milestones: tuple[float, ...] | None = None
    """Epochs after which the learning rate is divided by 10. Default: at 1/2 and 3/4 of the run."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum (the paper's authors used it in their code)."""
    weight_decay: float = 5e-4
    """Added to the gradient, times the weight."""
    dtype: str = "float32"
    """Of the computation: float32 or bfloat16; parameters are float32 always."""
    balance: str = "flops"
    """How to cut the network: flops, time (measured here), or uniform (equal numbers of layers)."""
    data_parallel: int = 1
    """Devices of each stage, which share every mini-batch."""
    batch_stats: str | None = None
    """[fr] When batch-norm running statistics move: play, replay, or both (as the authors' code). Default: play."""
    gradient_shrinking: float | None = None
    """[fr, ddg] FDG's factor b: module k's gradient is shrunk by b^(K-k). Default: 1, none."""
    accumulate: int | None = None
    """[fr, ddg, bp] ADL's m: one update for the mean gradient of m mini-batches. Default: 1."""
    weight_prediction: float | None = None
    """[fr, ddg] SpecTrain: how far the forward pass goes towards the weights of the update, 0 to 1. Default: 0."""
    synthesizer_hidden: int | None = None
    """[dni] Channels of the synthesizers' hidden layers. Default: as many as the feature has."""
    synthesizer_learning_rate: float | None = None
    """[dni] Step size of the synthesizers' Adam. Default: 0.001."""
    label_conditioning: bool = False
    """[dni] Show the labels to the synthesizers (cDNI)."""
    penalty: float | None = None
    """[blockprop] Weight lambda of the gluing losses. Default: 1."""
    h_steps: int | None = None
    """[blockprop] Gradient steps N_h on each gluing variable. Default: 1."""
    h_learning_rate: float | None = None
    """[blockprop] Their step size. Default: 0.01."""
    cache: bool = False
    """[blockprop] Keep the gluing variables of all examples on their devices (Algorithm 2)."""
    h_every: int | None = None
    """[blockprop] With --cache: take the h-steps at every E-th visit of an example only. Default: 1."""
    microbatches: int | None = None
    """[gpipe] Equal parts M of a mini-batch that go through the pipeline one after another. Default: 4."""
    devices: int | None = None
    """Devices to use; stages share them round robin. Default: K x data-parallel, or all there are if fewer."""
    eval_every: int | None = None
    """Steps between evaluations on the test set. Default: an epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: an epoch, but no more than 200."""
    compilation_cache: str = "auto"
    """Folder where compiled code is kept for the next start; auto: in the user's cache folder; none: nowhere."""
    log_every: int = 10
    """Steps averaged in one training row of metrics.jsonl."""
    preset: str | None = None
    """paper: ResNet164, CIFAR-10, 300 epochs, lr 0.01. blockprop: its figure 2, MNIST, one hidden layer. Flags win."""
    profile: bool = False
    """Write a jax.profiler trace of ten steps to the folder's profile/."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra: pip install 'fr_jax[tensorboard]')."""


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
    """Which process of a run of several this is; ``python -m fr_jax.launch`` makes them on one machine."""

    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes started by hand; stages are spread over all of them."""
    num_processes: int | None = None
    """With --coordinator: how many processes there are."""
    process_id: int | None = None
    """With --coordinator: which one this is, from 0. Process 0 prints and writes; the others need no --workdir."""
    distributed: bool = False
    """Find the other processes from SLURM, Open MPI or Kubernetes."""
    heartbeat: int = 60
    """Seconds without a sign of life of one process after which the others end."""


@dataclasses.dataclass(frozen=True)
class TrainSettings(SharedSettings, RunSettings, ProcessSettings):
    """Train an image classifier as K decoupled modules, one device each.

    Results go to a folder of their own (--workdir): config.json, metrics.jsonl, curves.png, summary.json, checkpoints/.
    Settings marked [method] or [model] belong to these alone; given for another, they are an error.
    """

    FOLDER_PREFIX: ClassVar[str] = ""  # of the default folder, where a program does more than train


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
}


def given(settings: SharedSettings, name: str) -> bool:
    """Whether an optional setting was given a value: it is neither None nor an unset flag."""
    value = getattr(settings, name)
    return value is not None and value is not False


def as_json(settings: SharedSettings) -> dict[str, Any]:
    """The settings as JSON holds them, for ``config.json``."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def from_json(config: Mapping[str, Any], name: str) -> Any:
    """A setting from a ``config.json``; one that did not exist when it was written had what is its default now."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    return config.get(name, defaults.get(name))


def flag(name: str) -> str:
    """``data_dir`` -> ``--data-dir``."""
    return f"--{name.removeprefix('resolved_').replace('_', '-')}"
