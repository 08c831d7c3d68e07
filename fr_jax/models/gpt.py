"""GPT: a causal transformer as a list of layers: embedding, attention and MLP by turns, head.

The network of Radford et al. 2019 ("Language models are unsupervised multitask learners"): pre-norm blocks,
h + Attention(LayerNorm(h)), then h + MLP(LayerNorm(h)), a final LayerNorm, and its initialisation. Rotary positions
are those of Su et al. 2021 (arXiv:2104.09864).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fr_jax.stages import from_linen
from fr_jax.types import Array, Stage

__all__ = ["gpt"]

STANDARD_DEVIATION, AT_WIDTH = 0.02, 768  # of the initial weights of GPT-2 small
ROTARY_BASE = 10_000.0
POSITIONS = ("rotary", "learned")
ATTENTION = ("auto", "xla", "cudnn")


class Layer(nn.Module):
    """The parts that all layers use. Features are ``(B, T, width)``."""

    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def norm(self, h: Array) -> Array:
        """Layer normalisation with scale and shift."""
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype)(h)

    def dense(self, h: Array, features: int, width: int, scale: float = 1.0) -> Array:
        """Dense layer whose first weights are multiplied by ``scale``."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(features, kernel_init=initial(width, scale), **options)(h)

    def dropout(self, h: Array, train: bool) -> Array:
        return nn.Dropout(self.dropout_rate, deterministic=not train)(h)


class Embedding(Layer):
    """Token embeddings, plus those of the positions ``0 .. T-1`` if they are learned. ``(B, T) -> (B, T, width)``."""

    vocab_size: int = 256
    width: int = 256
    positions: int = 0  # learned ones; 0 for none

    @nn.compact
    def __call__(self, tokens: Array, train: bool = True) -> Array:
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"gpt was given tokens of dtype {tokens.dtype}; they must be integers, such as int32.")
        init = initial(self.width)
        table = self.param("token_embedding", init, (self.vocab_size, self.width), self.param_dtype)
        h = table[tokens]
        if self.positions:
            length = tokens.shape[1]
            if length > self.positions:
                raise ValueError(
                    f"gpt was given sequences of {length} tokens; it has learned positions for context = "
                    f"{self.positions}. Make it with a larger context, or use rotary positions."
                )
            h += self.param("position_embedding", init, (self.positions, self.width), self.param_dtype)[None, :length]
        return self.dropout(h.astype(self.dtype), train)


class Attention(Layer):
    """``h + Attention(LayerNorm(h))``: every token sees itself and those before it."""

    heads: int = 4
    residual_scale: float = 1.0
    rotary: bool = True
    attention: str = "auto"

    @nn.compact
    def __call__(self, h: Array, train: bool = True) -> Array:
        B, T, width = h.shape
        heads = self.dense(self.norm(h), 3 * width, width).reshape(B, T, 3, self.heads, width // self.heads)
        q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        if self.rotary:
            q, k = rotated(q), rotated(k)
        available = "cudnn" if has_fused_kernel(q.dtype, q.shape[-1]) else "xla"
        kernel = available if self.attention == "auto" else self.attention
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)  # type: ignore[arg-type]
        return h + self.dropout(self.dense(y.reshape(B, T, width), width, width, self.residual_scale), train)


class MLP(Layer):
    """``h + MLP(LayerNorm(h))``: one hidden layer of four times the width, GELU."""

    residual_scale: float = 1.0

    @nn.compact
    def __call__(self, h: Array, train: bool = True) -> Array:
        width = h.shape[-1]
        y = nn.gelu(self.dense(self.norm(h), 4 * width, width))
        return h + self.dropout(self.dense(y, width, width, self.residual_scale), train)


class Head(Layer):
    """The last layer normalisation and the output matrix. ``(B, T, width) -> (B, T, vocab_size)``, float32 at least."""

    vocab_size: int = 256

    @nn.compact
    def __call__(self, h: Array, train: bool = True) -> Array:
        width = h.shape[-1]
        kernel = self.param("kernel", initial(width), (width, self.vocab_size), self.param_dtype).astype(self.dtype)
        # Added up in float32: logits that were rounded to bfloat16 would round the loss.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.einsum("btw,wv->btv", self.norm(h), kernel, preferred_element_type=wide)


def initial(width: int, scale: float = 1.0) -> nn.initializers.Initializer:
    """N(0, (0.02 scale)²) at GPT-2's width; for another width so that features have the same size as there."""
    return nn.initializers.normal(scale * STANDARD_DEVIATION * math.sqrt(AT_WIDTH / width))


def rotated(x: Array) -> Array:
    """Rotary positions: entries i and i + d/2 of a head at position t are rotated by t ROTARY_BASE^(-2i/d).

    Args:
      x: queries or keys ``(B, T, heads, d)``, d even.
    """
    T, d = x.shape[1], x.shape[-1]
    angles = np.arange(T)[:, None] * ROTARY_BASE ** (-np.arange(0, d, 2) / d)[None]
    wide = jnp.promote_types(x.dtype, jnp.float32)  # bfloat16 cannot tell position 256 from 257
    cos, sin = (jnp.asarray(f(angles), wide)[None, :, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def has_fused_kernel(dtype: jnp.dtype, head_width: int) -> bool:
    """Whether the default device is a GPU whose cuDNN has a fused attention kernel for such heads."""
    # Operations are counted with a CPU as default device, where the kernel could not be lowered.
    config: Any = jax.config
    device = config.jax_default_device or jax.devices()[0]
    if isinstance(device, str) or device.platform != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if head_width % 8 or head_width > 128:
        return False
    capability = getattr(device, "compute_capability", "")  # "9.0"; AMD's is a name
    return capability.replace(".", "").isdecimal() and float(capability) >= 8


def gpt(
    vocab_size: int = 256,
    depth: int = 8,
    width: int = 256,
    heads: int = 4,
    context: int = 256,
    *,
    positions: Literal["rotary", "learned"] = "rotary",
    dropout_rate: float = 0.0,
    attention: Literal["auto", "xla", "cudnn"] = "auto",
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
) -> list[Stage]:
    """A causal transformer that predicts the next token; by default one that reads bytes.

    Layers: the embedding, then for each of the ``depth`` blocks its attention and its MLP, so that cuts can fall
    between them, then the head: ``2 depth + 2``. Equal layers are the same stage and are traced once. There are
    ``12 depth width² + 13 depth width + 2 width + 2 vocab_size width`` parameters, and ``context width`` more with
    learned positions. With ``gpt(50257, 12, 768, 12, 1024, positions="learned")``, GPT-2 small, these are
    163,037,184: the published 124,439,808 and an output matrix of its own.

    Embedding and output matrix are not tied: they lie in the first and in the last stage, and one matrix would need
    both gradients, and the same update, at the same time. Matrices are drawn from N(0, 0.02² · 768 / width), which
    is GPT-2's for GPT-2's width, those in front of a residual sum with 1 / (2 depth) of that variance; biases start at
    zero. (With 0.02 for every width a network of width 64 was 0.17 nats per byte behind after 400 updates.)

    Args:
      vocab_size: number of different tokens.
      depth: number of blocks.
      width: of the features.
      heads: of the attention; they divide ``width``.
      context: longest sequence, with learned positions; with rotary ones sequences may have any length.
      positions: ``"rotary"``, or ``"learned"`` as in GPT-2.
      dropout_rate: after the embedding and of every residual branch, in [0, 1); attention weights are not dropped.
      attention: ``"xla"``, ``"cudnn"`` (the fused kernel; needs bfloat16 or float16, heads of 8, 16, .. 128 features,
        and an NVIDIA GPU of compute capability 8 or more), or ``"auto"``: cuDNN's where the default device has it.
        cuDNN's gradients need not repeat to the last bit unless ``XLA_FLAGS`` has
        ``--xla_gpu_deterministic_ops=true``.
      dtype: of the computation and of the features; normalisation, positions and softmax are computed in float32.
      param_dtype: of the weights.

    Returns:
      One stage per layer. Inputs are tokens ``(B, T)``, integers from 0 to ``vocab_size - 1``; outputs are logits
      ``(B, T, vocab_size)`` of the token after each, float32 at least, which depend on no later token.

    Raises:
      ValueError: a size is less than 1, ``heads`` does not divide ``width`` (rotary: into even parts), or another
        option has no such value; from the first stage, tokens that are not integers, or too many for ``context``.

    Example:
      >>> import jax, jax.numpy as jnp, fr_jax as fr
      >>> from fr_jax.models.gpt import gpt
      >>> net = fr.chain(*gpt(depth=2, width=32))
      >>> params, state = net.init(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
      >>> net.apply(params, state, jnp.zeros((4, 16), jnp.int32))[0].shape
      (4, 16, 256)
    """
    sizes = {"vocab_size": vocab_size, "depth": depth, "width": width, "heads": heads, "context": context}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"gpt() was given {name} = {size}; it must be at least 1.")
    for name, value, valid in (("positions", positions, POSITIONS), ("attention", attention, ATTENTION)):
        if value not in valid:
            raise ValueError(f"gpt() was given {name} = {value!r}; it must be one of {', '.join(valid)}.")
    parts = heads * (2 if positions == "rotary" else 1)
    if width % parts:
        even = ", each of even width for rotary positions" if positions == "rotary" else ""
        raise ValueError(
            f"gpt() was given width = {width}, which cannot be split into {heads} heads{even}. Use a multiple of "
            f"{parts}, such as {max(1, width // parts) * parts}."
        )
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"gpt() was given dropout_rate = {dropout_rate}; it must be at least 0 and below 1.")
    common = {"dropout_rate": dropout_rate, "dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    scale, rotary = 1 / math.sqrt(2 * depth), positions == "rotary"
    block = (
        Attention(heads=heads, residual_scale=scale, rotary=rotary, attention=attention, **common),
        MLP(residual_scale=scale, **common),
    )
    embedding = Embedding(vocab_size=vocab_size, width=width, positions=0 if rotary else context, **common)
    return [from_linen(layer) for layer in (embedding, *block * depth, Head(vocab_size=vocab_size, **common))]
