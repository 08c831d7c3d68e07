"""Gradient synthesizers for decoupled neural interfaces: small networks that predict a gradient from a feature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fr_jax.models.initializers import variance_scaling
from fr_jax.stages import from_linen
from fr_jax.types import Array, Stage

__all__ = ["synthesizer"]


class Synthesizer(nn.Module):
    """The network of :func:`synthesizer`."""

    hidden: int | None = None
    num_classes: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array | tuple[Array, Array], train: bool = True) -> Array:
        h, labels = _feature_and_labels(x, self.num_classes)
        y = h
        if labels is not None and self.num_classes is not None:
            classes = jax.nn.one_hot(labels, self.num_classes, dtype=h.dtype)
            classes = classes.reshape(*labels.shape, *(1,) * (h.ndim - 1 - labels.ndim), self.num_classes)
            y = jnp.concatenate([h, jnp.broadcast_to(classes, (*h.shape[:-1], self.num_classes))], axis=-1)
        he_normal = variance_scaling(2.0, "fan_in", "truncated_normal")
        for _ in range(2):
            y = self._layer(h, self.hidden or h.shape[-1], he_normal, use_bias=False)(y)
            y = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype)(y)
            y = nn.relu(y)
        y = self._layer(h, h.shape[-1], nn.initializers.zeros, use_bias=True)(y)
        # The gradient of a mean over the batch is 1/B of the gradient of one example's loss.
        return (y / h.shape[0]).astype(h.dtype)

    def _layer(self, h: Array, features: int, kernel_init: nn.initializers.Initializer, use_bias: bool) -> nn.Module:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": kernel_init}
        if h.ndim == 4:
            return nn.Conv(features, (5, 5), padding=2, use_bias=use_bias, **options)
        return nn.Dense(features, use_bias=use_bias, **options)


def _feature_and_labels(x: Array | tuple[Array, Array], num_classes: int | None) -> tuple[Array, Array | None]:
    if isinstance(x, tuple) and len(x) == 2 and num_classes is not None:
        return x
    if isinstance(x, jax.Array | np.ndarray) and num_classes is None:
        return jnp.asarray(x), None
    given = "(h, labels)" if isinstance(x, tuple) else "h alone" if isinstance(x, jax.Array | np.ndarray) else f"{x!r}"
    raise ValueError(
        f"a synthesizer with num_classes = {num_classes} was given {given}. Make it with synthesizer(num_classes) for "
        "label_conditioning=True, and with synthesizer() otherwise; a feature must be one array."
    )


def synthesizer(
    num_classes: int | None = None,
    dtype: jnp.dtype = jnp.float32,
    *,
    hidden: int | None = None,
    param_dtype: jnp.dtype = jnp.float32,
) -> Stage:
    """The synthesizer M(h) of the features replay paper (section 5, after Jaderberg et al. 2016).

    For images ``(B, H, W, C)``: two hidden 5×5 convolutions with padding 2, batch normalisation and ReLU, and a 5×5
    output convolution that starts at zero. For vectors ``(B, C)`` and sequences ``(B, T, C)``: dense layers instead.
    The output is divided by B: the layers predict the gradient of one example's loss, whatever the batch size.

    Args:
      num_classes: for a synthesizer conditioned on the labels (cDNI), whose input is ``(h, labels)`` with integer
        labels ``(B,)``: one further channel per class. ``None``: the input is ``h``.
      dtype: of the computation.
      param_dtype: of the weights.
      hidden: channels of the hidden layers; ``None``: as many as ``h`` has.

    Returns:
      A stage whose output has the shape and dtype of ``h``.

    Raises:
      ValueError: ``hidden`` or ``num_classes`` is less than 1; from the stage, labels without ``num_classes``,
        ``num_classes`` without labels, or a feature that is not one array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fr_jax.models import synthesizer
      >>> h = jnp.ones((8, 4))
      >>> M = synthesizer()
      >>> params, state = M.init(jax.random.key(0), h)
      >>> delta, _ = M.apply(params, state, h)
      >>> delta.shape, float(abs(delta).max())
      ((8, 4), 0.0)
    """
    for name, value in (("hidden", hidden), ("num_classes", num_classes)):
        if value is not None and value < 1:
            raise ValueError(f"synthesizer() was given {name} = {value}; it must be at least 1, or None.")
    return from_linen(Synthesizer(hidden, num_classes, dtype, param_dtype))
