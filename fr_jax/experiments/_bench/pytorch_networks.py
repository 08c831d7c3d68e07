"""Networks of :mod:`fr_jax.models` in PyTorch (not a dependency), to be timed beside them.

The same layers, kernels and shapes; names count as Flax counts (``conv0``, ``norm0``, ..): weights can be copied.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from fr_jax.types import PyTree

__all__ = ["NETWORKS", "copy_weights", "gpt", "network"]

SMALL, LARGE = (16, 32, 64), (64, 128, 256, 512)

NETWORKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    **{f"resnet{6 * n + 2}": ((n,) * 3, SMALL) for n in (1, 3, 5, 9, 18, 27)},
    "resnet18": ((2,) * 4, LARGE),
}
"""Name -> blocks and channels of each group. Those with :data:`SMALL` channels have the shortcut without weights."""


def network(name: str, num_classes: int = 10) -> Any:
    """The network as a ``torch.nn.Module``: images ``(B, 3, height, width)`` to logits ``(B, num_classes)``.

    Args:
      name: one of :data:`NETWORKS`.
      num_classes: size of the output.

    Raises:
      ImportError: PyTorch is not installed.
      KeyError: an unknown name.
    """
    from torch import nn

    counts, widths = NETWORKS[name]
    block = _block_class()
    layers, channels = [_stem(widths[0])], widths[0]
    for group, (count, width) in enumerate(zip(counts, widths, strict=True)):
        for i in range(count):
            layers.append(block(channels, width, 2 if group > 0 and i == 0 else 1, project=widths == LARGE))
            channels = width
    return nn.Sequential(*layers, _head(channels, num_classes))


def _conv(channels: int, features: int, kernel: int, strides: int = 1) -> Any:
    from torch import nn

    return nn.Conv2d(channels, features, kernel, strides, padding=kernel // 2, bias=False)


def _stem(features: int) -> Any:
    from torch import nn

    # BatchNorm2d's defaults are those of models/resnet.py: epsilon 1e-5, momentum 0.1 (0.9 in Flax's terms).
    return nn.Sequential(OrderedDict(conv0=_conv(3, features, 3), norm0=nn.BatchNorm2d(features), relu=nn.ReLU()))


def _head(channels: int, num_classes: int) -> Any:
    from torch import nn

    dense = nn.Linear(channels, num_classes)
    return nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), dense0=dense))


def _block_class() -> type:
    from torch import nn
    from torch.nn import functional

    class BasicBlock(nn.Module):
        """As :class:`fr_jax.models.resnet.BasicBlock`."""

        def __init__(self, channels: int, features: int, strides: int, *, project: bool) -> None:
            super().__init__()
            self.conv0, self.norm0 = _conv(channels, features, 3, strides), nn.BatchNorm2d(features)
            self.conv1, self.norm1 = _conv(features, features, 3), nn.BatchNorm2d(features)
            self.strides, self.extra = strides, features - channels
            self.project = project and channels != features
            if self.project:
                self.conv2, self.norm2 = _conv(channels, features, 1, strides), nn.BatchNorm2d(features)

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.norm0(self.conv0(x)))
            y = self.norm1(self.conv1(y))
            if self.project:
                x = self.norm2(self.conv2(x))
            elif self.extra:
                before = self.extra // 2
                x = functional.pad(x[:, :, :: self.strides, :: self.strides], (0, 0, 0, 0, before, self.extra - before))
            return functional.relu(x + y)

    return BasicBlock


def gpt(vocab_size: int = 256, depth: int = 8, width: int = 256, heads: int = 4) -> Any:
    """:func:`fr_jax.models.gpt` with rotary positions: tokens ``(B, T)``, int64, to logits ``(B, T, vocab_size)``.

    Its first weights are PyTorch's, of another size than those of :mod:`fr_jax.models.gpt`.

    Args:
      vocab_size: number of different tokens.
      depth: number of blocks, of two layers each: attention and MLP.
      width: of the features.
      heads: of the attention; they divide ``width`` into even parts.

    Raises:
      ImportError: PyTorch is not installed.
    """
    from torch import nn

    attention, mlp = _residual_classes()
    embedding = nn.Sequential(OrderedDict(token_embedding=nn.Embedding(vocab_size, width)))
    blocks = [layer for _ in range(depth) for layer in (attention(width, heads), mlp(width))]
    output = nn.Linear(width, vocab_size, bias=False)
    return nn.Sequential(embedding, *blocks, nn.Sequential(OrderedDict(norm0=nn.LayerNorm(width), kernel=output)))


def _residual_classes() -> tuple[type, type]:
    import torch
    from torch import nn
    from torch.nn import functional

    class Attention(nn.Module):
        """As :class:`fr_jax.models.gpt.Attention`."""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.norm0, self.heads = nn.LayerNorm(width), heads
            self.dense0, self.dense1 = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.tables: tuple[Any, Any] | None = None

        def forward(self, h: Any) -> Any:
            B, T, width = h.shape
            parts = self.dense0(self.norm0(h)).view(B, T, 3, self.heads, width // self.heads)
            if self.tables is None or len(self.tables[0]) != T:
                self.tables = rotary_tables(T, width // self.heads)
            cos, sin = self.tables
            a, b = parts[:, :, :2].chunk(2, dim=-1)  # queries and keys at once
            q, k = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, parts[:, :, 2].transpose(1, 2), is_causal=True)
            return h + self.dense1(y.transpose(1, 2).reshape(B, T, width))

    class MLP(nn.Module):
        """As :class:`fr_jax.models.gpt.MLP`."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm0 = nn.LayerNorm(width)
            self.dense0, self.dense1 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, h: Any) -> Any:
            return h + self.dense1(functional.gelu(self.dense0(self.norm0(h)), approximate="tanh"))

    def rotary_tables(T: int, d: int) -> tuple[Any, Any]:
        """Cosines and sines of the angles of :func:`fr_jax.models.gpt.rotated`, ``(T, 1, 1, d / 2)`` each."""
        angles = (np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, d, 2) / d))[:, None, None]
        cos, sin = (torch.from_numpy(f(angles)).float() for f in (np.cos, np.sin))
        return cos, sin

    return Attention, MLP


def copy_weights(params: PyTree, module: Any) -> None:
    """Gives ``module`` the weights of the same network in :mod:`fr_jax.models`.

    Args:
      params: one pytree per layer, as each layer's ``init`` returned it.
      module: what :func:`network` or :func:`gpt` returned; changed in place.
    """
    import torch

    kinds = {"conv": ("Conv",), "norm": ("BatchNorm", "LayerNorm"), "dense": ("Dense",)}
    for layer, torch_layer in zip(params, module, strict=True):
        for name, target in torch_layer.named_parameters():
            part, leaf = name.split(".")
            if part in layer:  # a matrix of the layer itself
                value = np.asarray(layer[part])
            else:
                (group,) = {f"{kind}_{part[-1]}" for kind in kinds[part[:-1]]} & set(layer)
                weight = "scale" if part.startswith("norm") else "kernel"
                value = np.asarray(layer[group][weight if leaf == "weight" else leaf])
            # Flax's kernels end with (in, out), PyTorch's begin with (out, in); an embedding is a table for both.
            if value.ndim > 1 and part != "token_embedding":
                value = np.moveaxis(value, (-1, -2), (0, 1))
            with torch.no_grad():
                target.copy_(torch.from_numpy(value.copy()))
