"""Networks as lists of layers, so that any cut between layers is possible."""

from collections.abc import Callable

from fr_jax.models.gpt import gpt
from fr_jax.models.mlp import mlp
from fr_jax.models.resnet import (
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnet164,
    wrn28_10,
)
from fr_jax.models.synthesizer import synthesizer
from fr_jax.types import Stage

_RESNETS = (resnet8, resnet18, resnet20, resnet32, resnet50, resnet56, resnet101, resnet110, resnet152, resnet164)

MODELS: dict[str, Callable[..., list[Stage]]] = {model.__name__: model for model in (mlp, *_RESNETS, wrn28_10, gpt)}
"""Name -> ``factory(outputs, dtype=jnp.float32, ...) -> list[Stage]``, one stage per layer.

``outputs``, the first argument, is ``num_classes=10`` or, of ``gpt``, which reads tokens, ``vocab_size=256``.
"""

__all__ = ["MODELS", "synthesizer", *MODELS]
