"""Residual networks for 32x32 images as lists of layers: a stem, the blocks, a head.

The networks of He et al. 2016 and of the features replay paper, whose "ResNet164" is the 6n+2 network with n = 27
*basic* blocks (not the pre-activation network of that name), and the wide network of Zagoruyko and Komodakis 2016.
Initialisation as in the code of the features replay paper: convolutions N(0, sqrt(2 / (k k out))), batch-norm scale 1
and shift 0, Kaiming normal for the last layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from fr_jax.models.initializers import variance_scaling
from fr_jax.stages import from_linen
from fr_jax.types import Array, Stage

__all__ = ["resnet8", "resnet18", "resnet20", "resnet32", "resnet50", "resnet56", "resnet101", "resnet110"]
__all__ += ["resnet152", "resnet164", "wrn28_10"]


def relu(x: Array) -> Array:
    """``flax.linen.relu``, written as a selection; the gradient at 0 is 0."""
    # XLA's CPU backend (jaxlib 0.10.2) repeats a maximum, and the batch norm before it, inside the transposition that
    # the gradient of the next convolution's weights needs: 34 ms instead of 7 for 128 images of 32x32x16, a quarter of
    # a training step of ResNet-20. It does not repeat a selection: that has two large operands. A
    # jax.lax.optimization_barrier makes no difference: it is removed before operations are fused.
    return jnp.where(x <= 0, 0.0, x)


class Layer(nn.Module):
    """The parts that all layers use. Images are ``(B, height, width, channels)``."""

    features: int
    strides: int = 1
    dtype: jnp.dtype = jnp.float32

    def conv(self, x: Array, features: int, kernel: int, strides: int = 1) -> Array:
        """Convolution without bias, zero-padded to ``kernel // 2`` on each side."""
        # He et al. 2015 with fan_out, not fan_in: so the code of the features replay paper initialises.
        init = variance_scaling(2.0, "fan_out", "normal")
        # Explicit padding: with stride 2, "SAME" would pad 0 and 1 pixels, and shift the image against the shortcut.
        options = {"padding": kernel // 2, "use_bias": False, "kernel_init": init, "dtype": self.dtype}
        return nn.Conv(features, (kernel, kernel), (strides, strides), **options)(x)

    def norm(self, x: Array, train: bool) -> Array:
        """Batch normalisation; the running statistics move by a tenth each time."""
        # Flax's momentum is what the old statistics keep: 0.9 here is PyTorch's 0.1.
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)(x)


class Stem(Layer):
    """3x3 convolution; batch norm and ReLU unless ``activate`` is False."""

    activate: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = self.conv(x, self.features, 3)
        return relu(self.norm(x, train)) if self.activate else x


class BasicBlock(Layer):
    """Two 3x3 convolutions. The shortcut is option A (subsample, pad channels with zeros), or a projection."""

    project: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        y = relu(self.norm(self.conv(x, self.features, 3, self.strides), train))
        y = self.norm(self.conv(y, self.features, 3), train)
        if x.shape != y.shape:
            if self.project:
                x = self.norm(self.conv(x, self.features, 1, self.strides), train)
            else:
                extra = self.features - x.shape[-1]
                x = x[:, :: self.strides, :: self.strides]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        # An input of a wider dtype than that of the layers must not widen the sum.
        return relu(y + x.astype(y.dtype))


class BottleneckBlock(Layer):
    """1x1, 3x3 (with the stride), 1x1 convolutions, four times as many channels out; projection shortcut."""

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        y = relu(self.norm(self.conv(x, self.features, 1), train))
        y = relu(self.norm(self.conv(y, self.features, 3, self.strides), train))
        y = self.norm(self.conv(y, 4 * self.features, 1), train)
        if x.shape != y.shape:
            x = self.norm(self.conv(x, 4 * self.features, 1, self.strides), train)
        return relu(y + x.astype(y.dtype))


def dropout(x: Array, rate: float, train: bool) -> Array:
    """``flax.linen.Dropout`` in a compact module, bit for bit; without training, or at rate 0, ``x`` itself."""
    # The mask is drawn flat, for the reason that initializers.py gives.
    return nn.Dropout(rate, deterministic=not train)(x.reshape(-1)).reshape(x.shape)


class WideBlock(Layer):
    """Pre-activation basic block with dropout between its convolutions (Zagoruyko and Komodakis 2016)."""

    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        activated = relu(self.norm(x, train))
        y = relu(self.norm(self.conv(activated, self.features, 3, self.strides), train))
        y = dropout(y, self.dropout_rate, train)
        y = self.conv(y, self.features, 3)
        if x.shape != y.shape:
            x = self.conv(activated, self.features, 1, self.strides)
        return y + x.astype(y.dtype)


class Head(Layer):
    """Global average pooling and the classifier; ``features`` is the number of classes. Float32 logits."""

    normalize: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        if self.normalize:
            x = relu(self.norm(x, train))
        x = x.mean(axis=(1, 2))
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        return nn.Dense(self.features, kernel_init=init, dtype=self.dtype)(x).astype(jnp.float32)


def _network(
    block: Callable[..., nn.Module],
    counts: Sequence[int],
    num_classes: int,
    dtype: jnp.dtype,
    width: int,
    *,
    stem: nn.Module | None = None,
    head: nn.Module | None = None,
) -> list[Stage]:
    """Stem, groups of blocks, head. Each group but the first halves the image and doubles the channels."""
    layers = [stem or Stem(width, dtype=dtype)]
    for group, count in enumerate(counts):
        strides = [2 if group > 0 and i == 0 else 1 for i in range(count)]
        layers += [block(2**group * width, strides=stride, dtype=dtype) for stride in strides]
    return [from_linen(layer) for layer in (*layers, head or Head(num_classes, dtype=dtype))]


def resnet20(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 16) -> list[Stage]:
    """ResNet-20 for 32x32 images: 3 groups of 3 basic blocks, 11 layers, 0.27 M parameters.

    One stage per layer: stem, blocks, head. Inputs are ``(B, height, width, channels)``, outputs logits
    ``(B, num_classes)``. ``dtype`` is that of the computation; parameters and logits are always float32. ``width`` are
    the channels of the first group. All networks of this file are like this.

    Example:
      >>> from fr_jax.models import resnet20
      >>> len(resnet20())
      11
    """
    return _network(BasicBlock, (3, 3, 3), num_classes, dtype, width)


def resnet8(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 16) -> list[Stage]:
    """ResNet-8: 3 groups of one basic block, 0.075 M parameters; for studies on a CPU. See :func:`resnet20`."""
    return _network(BasicBlock, (1, 1, 1), num_classes, dtype, width)


def resnet32(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 16) -> list[Stage]:
    """ResNet-32: 3 groups of 5 basic blocks, 0.46 M parameters. See :func:`resnet20`."""
    return _network(BasicBlock, (5, 5, 5), num_classes, dtype, width)


def resnet56(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 16) -> list[Stage]:
    """ResNet-56: 3 groups of 9 basic blocks, 0.85 M parameters. See :func:`resnet20`."""
    return _network(BasicBlock, (9, 9, 9), num_classes, dtype, width)


def resnet110(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 16) -> list[Stage]:
    """ResNet-110: 3 groups of 18 basic blocks, 1.7 M parameters. See :func:`resnet20`."""
    return _network(BasicBlock, (18, 18, 18), num_classes, dtype, width)


def resnet164(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 16) -> list[Stage]:
    """The features replay paper's ResNet164: 3 groups of 27 basic blocks, 2.6 M parameters. See :func:`resnet20`."""
    return _network(BasicBlock, (27, 27, 27), num_classes, dtype, width)


def resnet18(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 64) -> list[Stage]:
    """ResNet-18 with the stem for 32x32 images and projection shortcuts, 11.2 M parameters. See :func:`resnet20`."""
    block = functools.partial(BasicBlock, project=True)
    return _network(block, (2, 2, 2, 2), num_classes, dtype, width)


def resnet50(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 64) -> list[Stage]:
    """ResNet-50 with the stem for 32x32 images, 23.5 M parameters. See :func:`resnet20`."""
    return _network(BottleneckBlock, (3, 4, 6, 3), num_classes, dtype, width)


def resnet101(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 64) -> list[Stage]:
    """ResNet-101 with the stem for 32x32 images, 42.5 M parameters. See :func:`resnet20`."""
    return _network(BottleneckBlock, (3, 4, 23, 3), num_classes, dtype, width)


def resnet152(num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 64) -> list[Stage]:
    """ResNet-152 with the stem for 32x32 images, 58.2 M parameters. See :func:`resnet20`."""
    return _network(BottleneckBlock, (3, 8, 36, 3), num_classes, dtype, width)


def wrn28_10(
    num_classes: int = 10, dtype: jnp.dtype = jnp.float32, *, width: int = 160, dropout_rate: float = 0.0
) -> list[Stage]:
    """WRN-28-10: 3 groups of 4 wide pre-activation blocks, 36.5 M parameters. See :func:`resnet20`.

    ``width`` is that of the first group, 10 times 16; the stem keeps 16 channels.
    """
    block = functools.partial(WideBlock, dropout_rate=dropout_rate)
    stem, head = Stem(16, dtype=dtype, activate=False), Head(num_classes, dtype=dtype, normalize=True)
    return _network(block, (4, 4, 4), num_classes, dtype, width, stem=stem, head=head)
