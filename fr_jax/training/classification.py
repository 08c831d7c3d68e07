"""Cross entropy and accuracy, in training and over a test set."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fr_jax import distributed
from fr_jax._arrays import is_readable, put, read
from fr_jax.types import Array, Batch

__all__ = ["Score", "accuracy", "cross_entropy", "evaluate", "training_metrics"]

BATCHES_IN_FLIGHT = 4


class Score(NamedTuple):
    """Mean cross entropy (nats) and the fraction of examples classified correctly."""

    loss: float
    accuracy: float


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross entropy, in nats, of logits ``(B, classes)`` and labels ``(B,)`` int."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: Array, labels: Array) -> Array:
    """The fraction, in [0, 1], of logits ``(B, classes)`` whose largest entry is at the label ``(B,)``."""
    return (logits.argmax(-1) == labels).mean()


def training_metrics(logits: Array, labels: Array) -> dict[str, Array]:
    """What the last stage reports of each training mini-batch beside its loss."""
    return {"accuracy": accuracy(logits, labels)}


@jax.jit
def _sums(logits: Array, labels: Array, valid: Array) -> tuple[Array, Array]:
    counts = jnp.arange(labels.shape[0]) < valid
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(counts, losses, 0).sum(), jnp.where(counts, logits.argmax(-1) == labels, False).sum()


def evaluate(predict: Callable[[Any, Array], Array], state: Any, batches: Iterable[tuple[Batch, int]]) -> Score:
    """Loss and accuracy of the network in inference mode; every example counts once.

    Args:
      predict: ``Algorithm.predict``.
      state: a training state.
      batches: pairs of a batch of fixed size and how many of its first examples count.

    Returns:
      The score over all examples that count.

    Raises:
      ValueError: there is no example.
    """
    loss = correct = total = 0.0
    here = False  # whether the last stage, and with it the logits, are this process's
    pending: deque[tuple[Array, Array]] = deque()

    def collect() -> None:
        nonlocal loss, correct, here
        batch_loss, batch_correct = pending.popleft()
        here = is_readable(batch_loss)
        if here:
            loss += float(read(batch_loss))
            correct += float(read(batch_correct))

    group = distributed.group()
    for number, (batch, valid) in enumerate(batches, start=1):
        logits = predict(state, batch.inputs)
        pending.append(_sums(logits, put(batch.targets, logits.sharding), valid))
        total += valid
        if len(pending) > BATCHES_IN_FLIGHT:
            collect()
        if group.size > 1 and number % BATCHES_IN_FLIGHT == 0:
            group.exchange(None)  # whoever has not the last stage waits here for the one that has
    while pending:
        collect()
    if not total:
        raise ValueError("evaluate() was given no examples; the test set needs at least one.")
    sums = group.exchange([loss, correct] if here else None)
    loss, correct = next(known for known in sums if known is not None)
    return Score(loss / total, correct / total)
