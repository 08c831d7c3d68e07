"""The residual networks of :mod:`fr_jax.models` in PyTorch (not a dependency), to be timed beside them.

The same layers, kernels and shapes; names count as Flax counts (``conv0``, ``norm0``, ..): weights can be copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fr_jax.types import PyTree

__all__ = ["NETWORKS", "copy_weights", "network"]

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
    from collections import OrderedDict

    from torch import nn

    # BatchNorm2d's defaults are those of models/resnet.py: epsilon 1e-5, momentum 0.1 (0.9 in Flax's terms).
    return nn.Sequential(OrderedDict(conv0=_conv(3, features, 3), norm0=nn.BatchNorm2d(features), relu=nn.ReLU()))


def _head(channels: int, num_classes: int) -> Any:
    from collections import OrderedDict

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


def copy_weights(params: PyTree, module: Any) -> None:
    """Gives ``module`` the weights of the same network in :mod:`fr_jax.models`.

    Args:
      params: one pytree per layer, as each layer's ``init`` returned it.
      module: what :func:`network` returned; changed in place.
    """
    import torch

    flax_names = {"conv": ("Conv", {"weight": "kernel"}), "norm": ("BatchNorm", {"weight": "scale", "bias": "bias"})}
    flax_names["dense"] = ("Dense", {"weight": "kernel", "bias": "bias"})
    for layer, torch_layer in zip(params, module, strict=True):
        for name, target in torch_layer.named_parameters():
            part, leaf = name.split(".")
            kind, leaves = flax_names[part[:-1]]
            value = np.asarray(layer[f"{kind}_{part[-1]}"][leaves[leaf]])
            if value.ndim > 1:  # Flax's kernels end with (in, out), PyTorch's begin with (out, in)
                value = np.moveaxis(value, (-1, -2), (0, 1))
            with torch.no_grad():
                target.copy_(torch.from_numpy(value.copy()))
