"""Predicting the next byte of a text as a task: cross entropy, bits per byte, and a sample of what was learned."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from fr_jax import distributed
from fr_jax._arrays import is_readable, place, read
from fr_jax._placement import data_parallel_size, default_sharding, replicated
from fr_jax.data.pipelines import text_pipeline
from fr_jax.data.text import Corpus
from fr_jax.training.evaluation import sum_over
from fr_jax.training.task import Headline, Task
from fr_jax.types import Array, Predict

__all__ = ["Sampling", "language_modelling", "next_byte_loss", "sample", "training_metrics"]


class Sampling(NamedTuple):
    """How a model writes.

    Attributes:
      prompt: the text that it goes on from, at least one character; None: what suits the corpus.
      length: bytes to write; 0 for none.
      temperature: the logits are divided by it; 0 takes the most likely byte.
    """

    prompt: str | None = None
    length: int = 400
    temperature: float = 0.8


def next_byte_loss(logits: Array, targets: Array) -> Array:
    """Mean cross entropy, in nats per byte, of logits ``(B, T, 256)`` and the bytes that came next, ``(B, T)`` int."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def training_metrics(logits: Array, targets: Array) -> dict[str, Array]:
    """What the last stage reports for each training mini-batch in addition to its loss."""
    return {"bits_per_byte": next_byte_loss(logits, targets) / math.log(2)}


@jax.jit
def _sums(logits: Array, targets: Array, valid: Array) -> dict[str, Array]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(-1)
    # jnp.where instead of a product: what fills up the last batch may be NaN.
    return {"loss": jnp.where(jnp.arange(targets.shape[0]) < valid, losses, 0).sum()}


def language_modelling(
    corpus: Corpus,
    batch_size: int,
    context: int,
    *,
    seed: int,
    sharding: Sharding | None = None,
    test_windows: int | None = None,
    sampling: Sampling | None = None,
) -> Task:
    """The task of predicting each byte of a text from up to ``context`` bytes before it.

    A byte of a test window is predicted from those before it in the window: half a window on average.

    Args:
      corpus: what :func:`fr_jax.data.text.load` returned.
      batch_size: windows of a mini-batch.
      context: bytes of a window.
      seed: of the windows to train on, and of the sample.
      sharding: of the first stage; ``None`` is the default device.
      test_windows: as for :func:`fr_jax.data.text_pipeline`.
      sampling: how the trained model writes.

    Raises:
      DataError: a text that is shorter than a window.
      ValueError: a batch size that does not fit the devices.

    Example:
      >>> from fr_jax.data import text
      >>> task = language_modelling(text.load(files=[text.__file__]), 16, 128, seed=0)
      >>> task.pipeline.train_batch(0).inputs.shape, task.headline.name, task.units_per_step
      ((16, 128), 'bits_per_byte', 2048)
    """
    sharding = default_sharding() if sharding is None else sharding
    options: dict[str, Any] = {"seed": seed, "sharding": sharding, "test_windows": test_windows}
    pipeline = text_pipeline(corpus, batch_size, context, **options)

    def evaluate(predict: Any, state: Any) -> dict[str, float]:
        totals = sum_over(_sums, predict, state, pipeline.test_batches())
        loss = totals["loss"] / totals["examples"]
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    how = sampling or Sampling()

    def write(predict: Predict, state: Any) -> str:
        prompt = corpus.prompt if how.prompt is None else how.prompt
        options: dict[str, Any] = {"temperature": how.temperature, "seed": seed, "sharding": sharding}
        found = sample(predict, state, prompt.encode(), how.length, context=context, **options)
        text = found.decode("utf-8", errors="replace")
        # Other control characters could do anything to a terminal.
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

    return Task(
        dataset=corpus.name,
        source=f"{corpus.source}; windows of {context} bytes",
        pipeline=pipeline,
        loss=next_byte_loss,
        metrics=training_metrics,
        evaluate=evaluate,
        headline=Headline("bits_per_byte"),
        unit="tokens",
        units_per_step=batch_size * context,
        examples=None,
        checksum=corpus.checksum,
        sample=write if how.length else None,
    )


def sample(
    predict: Predict,
    state: Any,
    prompt: bytes,
    length: int,
    *,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
    sharding: Sharding | None = None,
) -> bytes:
    """``prompt`` and ``length`` further bytes, each drawn from softmax(logits / temperature) of a language model.

    The network sees the last ``context`` bytes. Its input always has that length, so that nothing is compiled twice:
    what lies behind the last byte has no effect on a causal network. In a run of several processes all must call this,
    and all get the same.

    Args:
      predict: ``Algorithm.predict`` of a network that maps bytes ``(B, T)`` to logits ``(B, T, 256)``.
      state: a training state.
      prompt: at least one byte.
      length: how many to draw.
      context: bytes that the network was trained on.
      temperature: 0 takes the most likely byte.
      seed: of the draws.
      sharding: of the first stage; ``None`` is the default device.

    Raises:
      ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt is empty; the network needs at least one byte to go on from.")
    sharding = default_sharding() if sharding is None else sharding
    written, group = bytearray(prompt), distributed.group()
    chances = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(length) / 2.0**64
    logits_at = None
    for chance in chances:
        window = np.frombuffer(written[-context:], np.uint8)
        padded = np.zeros((data_parallel_size(sharding), context), np.int32)  # a row for each device
        padded[:, : len(window)] = window
        outputs = predict(state, place(padded, sharding, copy=False))
        if logits_at is None:
            where = replicated(outputs.sharding)
            logits_at = jax.jit(lambda outputs, t: outputs[0, t].astype(jnp.float32), out_shardings=where)
        logits = logits_at(outputs, len(window) - 1)
        drawn = _draw(read(logits), temperature, chance) if is_readable(logits) else None  # where the last stage is
        written.append(next(byte for byte in group.exchange(drawn) if byte is not None))
    return bytes(written)


def _draw(logits: np.ndarray, temperature: float, chance: float) -> int:
    """The byte at which the cumulative distribution exceeds ``chance``, a number in [0, 1)."""
    if temperature == 0:
        return int(logits.argmax())
    odds = np.exp((logits.astype(np.float64) - logits.max()) / temperature).cumsum()
    return int(np.searchsorted(odds, chance * odds[-1], side="right"))
