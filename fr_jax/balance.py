"""Where to cut a network: the cost of each layer, and the cuts that make the slowest stage fastest."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fr_jax.stages import traced_once
from fr_jax.types import Array, PyTree, Stage

__all__ = ["balance", "layer_costs"]


def layer_costs(
    layers: Sequence[Stage],
    example_inputs: Array | jax.ShapeDtypeStruct,
    measure: Literal["flops", "time"] = "flops",
    *,
    repeats: int = 5,
) -> list[float]:
    """The cost of forward and vector-Jacobian product of every layer, for one mini-batch.

    Args:
      layers: the network, one stage a layer.
      example_inputs: ``(B, ...)``, a mini-batch or a ``jax.ShapeDtypeStruct``; only its shape and dtype matter.
      measure: ``"flops"``, counted by XLA without running anything; or ``"time"``, measured on the default device,
        the median of ``repeats`` runs. Equal layers with equal inputs are measured once.
      repeats: timed runs of each different layer, after one to warm up.

    Returns:
      One number a layer: floating-point operations, or seconds.

    Raises:
      ValueError: ``measure`` is neither of the two, or there are no layers.

    Example:
      >>> import jax.numpy as jnp
      >>> import fr_jax as fr
      >>> costs = fr.layer_costs(fr.models.mlp(depth=3, width=64), jnp.ones((8, 784)))
      >>> costs[0] > costs[1]
      True
    """
    if measure not in ("flops", "time"):
        raise ValueError(f"measure = {measure!r} is unknown; it can be 'flops' or 'time'.")
    if not layers:
        raise ValueError("layer_costs() was given no layers; it needs at least one.")
    cost_of = _count_flops if measure == "flops" else functools.partial(_measure_seconds, repeats=repeats)
    h: Any = jax.ShapeDtypeStruct(example_inputs.shape, jax.dtypes.canonicalize_dtype(example_inputs.dtype))
    known: dict[Any, float] = {}
    costs = []
    for layer in layers:
        params, state = jax.eval_shape(layer.init, jax.random.key(0), h)
        leaves, treedef = jax.tree.flatten(h)
        same = (layer.apply, treedef, tuple(leaves))
        if same not in known:
            known[same] = cost_of(_forward_and_vjp(layer), params, state, h)
        costs.append(known[same])
        h, _ = jax.eval_shape(_apply(layer), params, state, h)
    return costs


def _apply(layer: Stage) -> Callable:
    apply = traced_once(layer.apply)
    return lambda params, state, h: apply(params, state, h, key=jax.random.key(0), train=True)


def _forward_and_vjp(layer: Stage) -> Callable:
    """``(params, state, h) -> gradients`` with a cotangent of ones; integer inputs (tokens) have no gradient."""

    def run(params: PyTree, state: PyTree, h: PyTree) -> PyTree:
        differentiable = all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(h))
        if differentiable:
            y, vjp = jax.vjp(lambda p, x: _apply(layer)(p, state, x)[0], params, h)
        else:
            y, vjp = jax.vjp(lambda p: _apply(layer)(p, state, h)[0], params)
        return y, vjp(jax.tree.map(jnp.ones_like, y))

    return run


def _count_flops(run: Callable, *specs: PyTree) -> float:
    analysis = jax.jit(run).lower(*specs).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


def _measure_seconds(run: Callable, *specs: PyTree, repeats: int) -> float:
    rng = np.random.default_rng(0)

    def fill(spec: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(spec.dtype, jnp.inexact):
            return jnp.asarray(rng.standard_normal(spec.shape, np.float32) * 0.1, spec.dtype)
        return jnp.zeros(spec.shape, spec.dtype)

    jitted, arguments = jax.jit(run), jax.tree.map(fill, specs)
    jax.block_until_ready(jitted(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(jitted(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def balance(costs: Sequence[float], K: int, *, last_stage_weight: float = 1.0) -> tuple[int, ...]:
    """Cuts a list of layers into K stages so that the slowest stage is as fast as possible.

    Exact, by dynamic programming over (stages, layers): best[k][i], the least possible cost of the slowest of
    the first k stages when they hold the first i layers, in O(K L^2).

    Args:
      costs: one non-negative number a layer (:func:`layer_costs`).
      K: number of stages, 1 to ``len(costs)``.
      last_stage_weight: what a unit of cost counts in the last stage. Features replay does 4 units of work in each
        stage (play 1, replay 1, backward 2), but 3 in the last, whose play is its replay: use 0.75.

    Returns:
      K-1 increasing positions; stage k holds ``layers[cuts[k-1]:cuts[k]]``.

    Raises:
      ValueError: K is out of range, or a cost is negative or not finite.

    Example:
      >>> import fr_jax as fr
      >>> fr.balance([4.0, 1.0, 1.0, 2.0, 2.0], 2)
      (2,)
    """
    L = len(costs)
    if not 1 <= K <= L:
        raise ValueError(f"K = {K} stages were asked of {L} layers; K can be 1 to {L}. Use a smaller K or more layers.")
    if not all(np.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(f"costs must be finite and at least 0; given were {list(costs)}.")
    total = np.concatenate([[0.0], np.cumsum(np.asarray(costs, float))])
    best = np.full((K + 1, L + 1), np.inf)
    start_of_last = np.zeros((K + 1, L + 1), int)
    best[0, 0] = 0.0
    for k in range(1, K + 1):
        weight = last_stage_weight if k == K else 1.0
        for i in range(k, L - (K - k) + 1):
            slowest = np.maximum(best[k - 1, k - 1 : i], weight * (total[i] - total[k - 1 : i]))
            j = int(np.argmin(slowest))
            best[k, i], start_of_last[k, i] = slowest[j], j + k - 1
    cuts, i = [], L
    for k in range(K, 1, -1):
        i = int(start_of_last[k, i])
        cuts.append(i)
    return tuple(reversed(cuts))
