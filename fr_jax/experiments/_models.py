"""A card per model that has settings of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fr_jax.experiments._fields import Own, own_setting

__all__ = ["MODEL_CARDS", "ModelCard"]


class ModelCard(NamedTuple):
    """What the programs know of a model beside its factory in ``fr_jax.models.MODELS``.

    Attributes:
      own: its own settings (arguments of the factory), and their defaults.
      rate_divisor: by what the default step size of a residual network is divided.
    """

    own: Mapping[Own, Any]
    rate_divisor: float = 1.0

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own settings by name, and their defaults."""
        return {one.name: default for one, default in self.own.items()}


MODEL_CARDS: dict[str, ModelCard] = {
    "mlp": ModelCard(
        {
            own_setting("depth", int, "Dense layers, the output layer included.", least=1): 6,
            own_setting("width", int, "Units of a hidden layer.", least=1): 256,
            own_setting("dropout_rate", float, "Of every hidden layer.", least=0, below=1): 0.0,
        },
        rate_divisor=5,  # it has no batch normalisation
    ),
}
