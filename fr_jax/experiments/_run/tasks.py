"""The kinds of tasks that the programs can train: where their data come from, their networks, their task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax.sharding import Sharding

import fr_jax as fr
from fr_jax.data import image_sets, text
from fr_jax.data.pipelines import check_length, windows_in
from fr_jax.experiments._cli.checks import resolve
from fr_jax.experiments._cli.settings import CommonSettings, Resolved, TrainSettings, own_of_model
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS
from fr_jax.training.classification import classification
from fr_jax.training.language import Sampling, language_modelling
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
      load: ``(settings, *, preferred, log=print) -> data``; ``--dataset auto`` is the ``preferred`` one, if found.
      examples: ``(settings, data) -> int``, the number of training examples.
      layers: ``(settings, data) -> list[Stage]``, the network of ``settings.model``.
      task: ``(settings, data, sharding) -> Task``, with its mini-batches where the first stage is.
    """

    auto: str
    load: Callable[..., Any]
    examples: Callable[[TrainSettings, Any], int]
    layers: Callable[[Resolved, Any], list[Stage]]
    task: Callable[[Resolved, Any, Sharding], Task]


def _images(settings: CommonSettings, *, preferred: str, **options: Any) -> image_sets.Dataset:
    preferred = preferred if preferred in image_sets.DATASETS else IMAGES.auto  # a program for text has another
    return image_sets.load(settings.dataset, settings.data_dir, preferred=preferred, **options)


def _image_layers(settings: Resolved, dataset: image_sets.Dataset) -> list[Stage]:
    own, dtype = own_of_model(settings), jnp.dtype(settings.dtype)
    return fr.models.MODELS[settings.model](num_classes=dataset.num_classes, dtype=dtype, **own)


def _image_task(settings: Resolved, dataset: image_sets.Dataset, sharding: Sharding) -> Task:
    shown = settings.test_examples
    dataset = dataset._replace(test_images=dataset.test_images[:shown], test_labels=dataset.test_labels[:shown])
    # What is kept of every example belongs to the example as it is.
    augment = False if METHODS[settings.method].full_batch else None
    return classification(dataset, settings.batch_size, seed=settings.seed, sharding=sharding, augment=augment)


IMAGES = Kind(
    auto="cifar10",
    load=_images,
    examples=lambda settings, dataset: len(dataset.train_labels),
    layers=_image_layers,
    task=_image_task,
)


def _text(settings: CommonSettings, *, preferred: str, log: Callable[[str], Any] = print) -> text.Corpus:
    if settings.data_dir is not None:
        raise SettingsError(f"--data-dir {settings.data_dir} is for images. Give files and folders of text by --text.")
    return text.load(settings.dataset, settings.text or (), log=log)


def _text_windows(settings: TrainSettings, corpus: text.Corpus) -> int:
    context = own_of_model(settings)["context"]
    check_length(corpus, context)
    return windows_in(corpus.train, context)


def _text_layers(settings: Resolved, corpus: text.Corpus) -> list[Stage]:
    own, dtype = own_of_model(settings), jnp.dtype(settings.dtype)
    return fr.models.MODELS[settings.model](vocab_size=256, dtype=dtype, **own)


def _text_task(settings: Resolved, corpus: text.Corpus, sharding: Sharding) -> Task:
    s = settings
    if s.prompt == "":
        raise SettingsError("--prompt is empty; the model needs at least one character to go on from. Drop the flag.")
    given: dict[str, Any] = {"prompt": s.prompt, "length": s.sample_bytes, "temperature": s.temperature}
    return language_modelling(
        corpus,
        s.batch_size,
        own_of_model(s)["context"],
        seed=s.seed,
        sharding=sharding,
        test_windows=s.test_examples,
        sampling=Sampling(**{name: value for name, value in given.items() if value is not None}),
    )


TEXT = Kind(auto="python", load=_text, examples=_text_windows, layers=_text_layers, task=_text_task)

KINDS: dict[str, Kind] = {"mlp": IMAGES._replace(auto="mnist"), "gpt": TEXT}
"""Model -> kind of its task; all others classify images."""


def resolve_for(settings: TrainSettings, data: Data) -> Resolved:
    """The settings of a run on these data; raises as :func:`fr_jax.experiments._cli.checks.resolve` does."""
    return resolve(settings, data.name, kind_of(settings.model).examples(settings, data))


def kind_of(model: str) -> Kind:
    """The kind of task that a model is for."""
    return KINDS.get(model, IMAGES)
