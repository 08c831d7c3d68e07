"""A card per model that has settings of its own, and random mini-batches of what models read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fr_jax.experiments._fields import Own, own_setting
from fr_jax.types import Batch

__all__ = ["MODEL_CARDS", "ModelCard", "example_inputs", "random_batch"]

CLASSES = 10


class ModelCard(NamedTuple):
    """What the programs know of a model beside its factory in ``fr_jax.models.MODELS``.

    Attributes:
      own: its own settings (arguments of the factory), and their defaults.
      rate_divisor: by what the default step size of a residual network is divided.
      batch_size: default examples of a mini-batch; None: as for images.
    """

    own: Mapping[Own, Any]
    rate_divisor: float = 1.0
    batch_size: int | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own settings by name, and their defaults."""
        return {one.name: default for one, default in self.own.items()}


DEPTH = own_setting("depth", int, "Dense layers of an mlp, the output layer included; blocks of a gpt.", least=1)
WIDTH = own_setting("width", int, "Units of a hidden layer; features of a gpt.", least=1)
DROPOUT = own_setting("dropout_rate", float, "Of every hidden layer, or residual branch.", least=0, below=1)

MODEL_CARDS: dict[str, ModelCard] = {
    "mlp": ModelCard(
        {DEPTH: 6, WIDTH: 256, DROPOUT: 0.0},
        rate_divisor=5,  # it has no batch normalisation
    ),
    "gpt": ModelCard(
        {
            DEPTH: 8,
            WIDTH: 128,
            own_setting("heads", int, "Heads of the attention.", least=1): 4,
            own_setting("context", int, "Bytes that the model sees, and of a training window.", least=1): 128,
            own_setting("positions", str, "rotary or learned.", choices=("rotary", "learned")): "rotary",
            DROPOUT: 0.0,
        },
        batch_size=16,
    ),
}


def random_batch(model: str, size: int, context: int | None = None) -> Batch:
    """Random inputs and targets, NumPy arrays: 32x32x3 images and labels, or ``context`` bytes and the next ones."""
    rng = np.random.default_rng(0)
    context = context or (MODEL_CARDS[model].defaults.get("context") if model in MODEL_CARDS else None)
    if context is not None:
        text = rng.integers(0, 256, (size, context + 1)).astype(np.int32)
        return Batch(text[:, :-1], text[:, 1:])  # type: ignore[arg-type]
    images = rng.standard_normal((size, 32, 32, 3)).astype(np.float32)
    return Batch(images, rng.integers(0, CLASSES, size).astype(np.int32))  # type: ignore[arg-type]


def example_inputs(model: str, size: int, context: int | None = None) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the inputs of a :func:`random_batch`."""
    inputs = random_batch(model, 1, context).inputs
    return jax.ShapeDtypeStruct((size, *inputs.shape[1:]), inputs.dtype)
