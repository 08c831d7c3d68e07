"""A mini-batch in M equal micro-batches, and what is added up over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from fr_jax._placement import jit, replicated
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._losses import Scored, combine, wide
from fr_jax.algorithms._validation import Setup
from fr_jax.types import PyTree


class Shared(NamedTuple):
    """The jitted functions that every method needs for one update per mini-batch of M micro-batches.

    Attributes:
      split_inputs: a mini-batch's inputs into its M micro-batches, on the first stage's devices.
      split_targets: its targets, on the last stage's.
      combine: loss, weight and metrics of a mini-batch from those of its micro-batches.
      zeros: for each stage, ``params -> sums``, where its gradients are added up.
      updates: for each stage, its optimizer's step (``_functions.make_update``).
      norms: for each stage, the norm of what its update is given.
    """

    split_inputs: Callable
    split_targets: Callable
    combine: Callable
    zeros: tuple[Callable, ...]
    updates: tuple[Callable, ...]
    norms: tuple[Callable, ...]


def make_shared(setup: Setup, *, holding: int = 0) -> Shared:
    """The shared functions of a method; something in flight holds old weights of the first ``holding`` stages."""
    shardings, M = setup.shardings, setup.microbatches

    def combined(*parts: Scored) -> tuple:
        return combine(parts)

    return Shared(
        split_inputs=make_split(shardings[0], M),
        split_targets=make_split(shardings[-1], M),
        combine=jit(combined, out_shardings=replicated(shardings[-1])),
        zeros=tuple(jit(_zeros, out_shardings=replicated(sharding)) for sharding in shardings),
        updates=tuple(
            functions.make_update(
                optimizer,
                sharding,
                M=M,
                donate=setup.donate,
                keep_params=k < holding,
                return_grads=setup.return_grads,
                skip=setup.skip_nonfinite,
            )
            for k, (optimizer, sharding) in enumerate(zip(setup.optimizers, shardings, strict=True))
        ),
        norms=tuple(functions.make_norm(sharding, M=M) for sharding in shardings),
    )


def _zeros(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf.dtype)), params)


def make_split(sharding: Sharding | None, M: int) -> Callable:
    """``x -> (x_0, ..., x_{M-1})``, where x_m has the rows m, m+M, m+2M, ... of every leaf of x.

    If contiguous rows of x lie on D devices, each device's own are split, and nothing is sent between devices.
    """

    def split(x: PyTree) -> tuple[PyTree, ...]:
        rows = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] // M, M, *leaf.shape[1:]), x)
        part = lambda m: jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, m, axis=1, keepdims=False), rows)
        return tuple(part(m) for m in range(M))

    # Rows m, m+M, ... and not a contiguous block: with D devices every micro-batch then has rows of each.
    return jit(split, out_shardings=sharding)
