"""Image classification as a task: cross entropy and accuracy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax.data.image_sets import Dataset
from fr_jax.data.pipelines import input_pipeline
from fr_jax.training.evaluation import sum_over
from fr_jax.training.task import ACCURACY, Task
from fr_jax.types import Array

__all__ = ["accuracy", "classification", "cross_entropy", "training_metrics"]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross entropy, in nats, of logits ``(B, classes)`` and labels ``(B,)`` int."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: Array, labels: Array) -> Array:
    """The fraction, in [0, 1], of logits ``(B, classes)`` whose largest entry is at the label ``(B,)``."""
    return (logits.argmax(-1) == labels).mean()


def training_metrics(logits: Array, labels: Array) -> dict[str, Array]:
    """What the last stage reports for each training mini-batch in addition to its loss."""
    return {"accuracy": accuracy(logits, labels)}


@jax.jit
def _sums(logits: Array, labels: Array, valid: Array) -> dict[str, Array]:
    # jnp.where instead of a product: what fills up the last batch may be NaN.
    counts = jnp.arange(labels.shape[0]) < valid
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.where(counts, logits.argmax(-1) == labels, False)
    return {"loss": jnp.where(counts, losses, 0).sum(), "accuracy": correct.sum()}


def classification(
    dataset: Dataset, batch_size: int, *, seed: int, sharding: Sharding | None = None, augment: bool | None = None
) -> Task:
    """The task of classifying the images of ``dataset``.

    Args:
      dataset: what :func:`fr_jax.data.image_sets.load` returned.
      batch_size: images of a mini-batch.
      seed: of the order and of the augmentation.
      sharding: of the first stage; ``None`` is the default device.
      augment: whether to crop and flip, as :func:`fr_jax.data.input_pipeline` has it.

    Raises:
      ValueError: a batch size that does not fit the data or the devices.

    Example:
      >>> from fr_jax.data import image_sets
      >>> task = classification(image_sets.load("digits"), 64, seed=0)
      >>> task.pipeline.train_batch(0).inputs.shape, task.headline.name
      ((64, 32, 32, 3), 'accuracy')
    """
    pipeline = input_pipeline(dataset, batch_size, seed=seed, sharding=sharding, augment=augment)

    def evaluate(predict: Any, state: Any) -> dict[str, float]:
        totals = sum_over(_sums, predict, state, pipeline.test_batches())
        return {name: totals[name] / totals["examples"] for name in ("loss", "accuracy")}

    return Task(
        dataset=dataset.name,
        source=dataset.source,
        pipeline=pipeline,
        loss=cross_entropy,
        metrics=training_metrics,
        evaluate=evaluate,
        headline=ACCURACY,
        unit="images",
        units_per_step=batch_size,
        examples=len(dataset.train_labels),
        num_classes=dataset.num_classes,
    )
