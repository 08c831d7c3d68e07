"""The multilayer perceptron, as a list of dense layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from fr_jax.stages import from_linen
from fr_jax.types import Array, Stage

__all__ = ["mlp"]


class DenseLayer(nn.Module):
    """Dense layer, then ReLU and dropout unless it is the output layer. ``(B, ...) -> (B, features)``."""

    features: int
    output: bool = False
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = x.reshape(x.shape[0], -1)
        init = nn.initializers.variance_scaling(1.0 if self.output else 2.0, "fan_in", "truncated_normal")
        x = nn.Dense(self.features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init)(x)
        if self.output:  # the loss is computed in float32 at least, whatever dtype the layers compute in
            return x.astype(self.param_dtype if jnp.finfo(self.param_dtype).bits > 32 else jnp.float32)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(nn.relu(x))


def mlp(
    num_classes: int = 10,
    dtype: jnp.dtype = jnp.float32,
    *,
    depth: int = 6,
    width: int = 256,
    hidden: Sequence[int] | None = None,
    dropout_rate: float = 0.0,
    param_dtype: jnp.dtype = jnp.float32,
) -> list[Stage]:
    """A multilayer perceptron with ReLU; inputs of any shape are flattened.

    Args:
      num_classes: size of the output.
      dtype: of the computation.
      param_dtype: of the weights.
      depth: number of dense layers, including the output layer.
      width: units of each hidden layer.
      hidden: the width of each hidden layer, instead of ``depth`` and ``width``.
      dropout_rate: of every hidden layer, in [0, 1).

    Returns:
      One stage per layer; the outputs are logits ``(B, num_classes)``.

    Raises:
      ValueError: ``depth``, a width or ``num_classes`` is less than 1, or ``dropout_rate`` is outside [0, 1).

    Example:
      >>> from fr_jax.models import mlp
      >>> len(mlp(depth=6))
      6
    """
    if hidden is None:
        if depth < 1:
            raise ValueError(f"mlp() was given depth = {depth}; a network has at least 1 layer.")
        hidden = (width,) * (depth - 1)
    for name, units in (("num_classes", num_classes), *(("a hidden width", units) for units in hidden)):
        if units < 1:
            raise ValueError(f"mlp() was given {name} of {units}; a layer has at least 1 unit.")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"mlp() was given dropout_rate = {dropout_rate}; it must be at least 0 and below 1.")
    options = {"dtype": dtype, "param_dtype": param_dtype}
    layers = [DenseLayer(int(units), dropout_rate=dropout_rate, **options) for units in hidden]
    return [from_linen(layer) for layer in (*layers, DenseLayer(num_classes, output=True, **options))]
