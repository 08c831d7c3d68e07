"""The kinds of tasks that the programs can train: where their data come from, their networks, their task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax.sharding import Sharding

import fr_jax as fr
from fr_jax.data import image_sets
from fr_jax.experiments._cli.checks import resolve
from fr_jax.experiments._cli.settings import Resolved, TrainSettings, own_of_model
from fr_jax.training.classification import classification
from fr_jax.training.task import Task
from fr_jax.types import Stage

__all__ = ["Data", "Kind", "kind_of", "resolve_for"]


class Data(Protocol):
    """What every data set has: its name, and one line for people that says where it came from."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...


class Kind(NamedTuple):
    """A kind of task. A further one is an entry of ``KINDS``, by the models that are for it.

    Attributes:
      auto: the data set that ``compare`` looks for under ``--dataset auto``.
      load: ``(name, data_dir, *, preferred, log=print) -> data``; ``auto`` is the ``preferred`` one, if it is found.
      examples: ``(settings, data) -> int``, the number of training examples.
      layers: ``(settings, data) -> list[Stage]``, the network of ``settings.model``.
      task: ``(settings, data, sharding) -> Task``, with its mini-batches where the first stage is.
    """

    auto: str
    load: Callable[..., Any]
    examples: Callable[[TrainSettings, Any], int]
    layers: Callable[[Resolved, Any], list[Stage]]
    task: Callable[[Resolved, Any, Sharding], Task]


def _image_layers(settings: Resolved, dataset: image_sets.Dataset) -> list[Stage]:
    own, dtype = own_of_model(settings), jnp.dtype(settings.dtype)
    return fr.models.MODELS[settings.model](num_classes=dataset.num_classes, dtype=dtype, **own)


def _image_task(settings: Resolved, dataset: image_sets.Dataset, sharding: Sharding) -> Task:
    shown = settings.test_examples
    dataset = dataset._replace(test_images=dataset.test_images[:shown], test_labels=dataset.test_labels[:shown])
    return classification(dataset, settings.batch_size, seed=settings.seed, sharding=sharding)


IMAGES = Kind(
    auto="cifar10",
    # Not image_sets.load itself: tests and notebooks replace it.
    load=lambda *args, **options: image_sets.load(*args, **options),
    examples=lambda settings, dataset: len(dataset.train_labels),
    layers=_image_layers,
    task=_image_task,
)

KINDS: dict[str, Kind] = {"mlp": IMAGES._replace(auto="mnist")}
"""Model -> kind of its task; all others classify images."""


def resolve_for(settings: TrainSettings, data: Data) -> Resolved:
    """The settings of a run on these data; raises as :func:`fr_jax.experiments._cli.checks.resolve` does."""
    return resolve(settings, data.name, kind_of(settings.model).examples(settings, data))


def kind_of(model: str) -> Kind:
    """The kind of task that a model is for."""
    return KINDS.get(model, IMAGES)
