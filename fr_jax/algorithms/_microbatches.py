"""A mini-batch in M equal parts, and the mean of what is computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Sharding

from fr_jax._placement import data_parallel_size, replicated
from fr_jax.algorithms._losses import wide
from fr_jax.algorithms._validation import batch_size, check_example
from fr_jax.types import Batch, PyTree


def make_split(sharding: Sharding | None, M: int) -> Callable:
    """``x -> (x_0, ..., x_{M-1})``, where x_m has the rows m, m+M, m+2M, ... of every leaf of x.

    If contiguous rows of x lie on D devices, each device's own are split, and nothing is sent between devices.
    """

    def split(x: PyTree) -> tuple[PyTree, ...]:
        rows = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] // M, M, *leaf.shape[1:]), x)
        part = lambda m: jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, m, axis=1, keepdims=False), rows)
        return tuple(part(m) for m in range(M))

    # Rows m, m+M, ... and not a contiguous block: with D devices every microbatch then has rows of each.
    return jax.jit(split, out_shardings=sharding)


def make_accumulate(sharding: Sharding | None, *, count: int) -> Callable:
    """``(total, x) -> total + x / count``, leaf by leaf: a mean of ``count`` trees, which starts at ``total`` = None.

    It is added up in float32 at least. The buffers of ``total`` are always given back; those of ``x`` never.
    """

    def accumulate(total: PyTree | None, x: PyTree) -> PyTree:
        part = jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)) / count, x)
        return part if total is None else jax.tree.map(lambda a, b: a + b, total, part)

    return jax.jit(accumulate, donate_argnames="total", out_shardings=replicated(sharding))


def check_split(batch: Batch, M: int, shardings: Sequence[Sharding], called: str = "init()") -> None:
    """Raises ValueError if a batch cannot be split into M equal microbatches, and these over a stage's devices."""
    check_example(batch, called)
    B, D = batch_size(batch), math.lcm(*(data_parallel_size(sharding) for sharding in shardings))
    if B % (M * D):
        raise ValueError(
            f"a batch of {B} examples cannot be split into microbatches = {M} equal parts, each over data_parallel = "
            f"{D} device(s); the batch size must be a multiple of {M} * {D} = {M * D}. Change the batch size or the "
            "number of microbatches; drop or pad a last partial batch."
        )
