"""BlockProp (Gotmare, Thomas, Brea, Jaggi 2018), Algorithms 1 and 2: blocks that agree on what passes between them.

Each block k = 1..K, b_k with weights w_k, has its own input h_k: h_1 = x, and the gluing variables h_2..h_K, which only
tend to equal b_{k-1}(h_{k-1}). A mini-batch of B examples, the sums and norms being those of one example:

    forward   p_{k+1} = b_k(h_k),  h_{k+1} = p_{k+1},  or the kept value h*_{k+1} where the example has one;  k = 1..K-1
    h-step    for k = K..2:  h <- h - gamma_k dL_k(h)/dh,  N_h times from h_k on;  h*_k is the result, sent to block k-1
              L_k(h) = lambda_k ||h*_{k+1} - b_k(h)||^2 + lambda_{k-1} ||h - p_k||^2,  k < K
              L_K(h) = loss(y, b_K(h)) + lambda_{K-1} ||h - p_K||^2
    W-step    for all k in parallel:  w_k <- w_k - gamma_t dJ_k/dw_k
              J_k = mean over the batch of lambda_k ||h*_{k+1} - b_k(h*_k)||^2,  k < K;  J_K = loss(y, b_K(h*_K))

Every example has its own L_k, so B times ``loss_fn``, a mean over the batch, enters the h-step. All passes of a
mini-batch normalise with its statistics and draw the same dropout masks; the W-step moves the running statistics.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from fr_jax.algorithms import _example_cache as cache
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._losses import loss_of, wide
from fr_jax.algorithms._stages import KeyStream, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_train
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_count, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["BlockPropState", "blockprop"]


class Gluing(NamedTuple):
    """The checked arguments: lambda_1..lambda_{K-1}, N_h, gamma_2..gamma_K, N (None: nothing is kept), E."""

    penalty: tuple[float, ...]
    h_steps: int
    rates: tuple[float, ...]
    cache_size: int | None
    h_every: int


class BlockPropState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`), and what the method keeps; nothing is in flight.

    Attributes:
      cache: h*_k of every example, ``(N, ...)``; ``()`` for block 1, and for all without ``cache_size``.
      visits: how often each example was seen, ``(N,)`` int32; ``()`` without ``cache_size``.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    cache: tuple[PyTree, ...]
    visits: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    own: Gluing,
    setup: Setup,
    parts: BlockPropParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> BlockPropState:
    """Weights w^0; no example has been seen."""
    stages = init_stages(setup, key, batch, params, model_state)
    cache.check_index(own.cache_size, batch)
    kept, visits = cache.empty(own.cache_size, stages.features, setup.shardings)
    return BlockPropState(**stages.fields(), cache=kept, visits=visits)


def gluing_loss(h: PyTree, other: PyTree) -> Array:
    """||h - other||^2: the sum over the features, the mean over the batch."""
    pairs = zip(jax.tree.leaves(h), jax.tree.leaves(other), strict=True)
    differences = [a.astype(wide(a.dtype)) - b.astype(wide(b.dtype)) for a, b in pairs]
    return sum(jnp.sum(jnp.square(d)) for d in differences) / differences[0].shape[0]


class BlockPropParts(NamedTuple):
    """The jitted functions of the blocks; ``forwards`` are those of 1..K-1, ``h_steps`` those of 2..K."""

    forwards: tuple[Callable, ...]
    memories: tuple[tuple[Callable, Callable], ...]
    h_steps: tuple[Callable, ...]
    learns: tuple[Callable, ...]


def make_parts(setup: Setup, own: Gluing) -> BlockPropParts:
    """Forward pass, kept values, h-step and W-step of every block. ``J[k]`` is what its output is trained with."""
    stages, optimizers, shardings, donate = setup.stages, setup.optimizers, setup.shardings, setup.donate
    blocks, skip = range(len(stages)), own.h_every > 1
    J = [*(lambda out, h, c=c: c * gluing_loss(out, h) for c in own.penalty), functools.partial(loss_of, setup.loss_fn)]
    metrics = [
        *(lambda out, h, k=k: {f"gluing_loss/{k}": gluing_loss(out, h)} for k in blocks[1:]),
        setup.metrics_fn,
    ]
    play = functools.partial(functions.make_play, update_stats=False, donate=donate)
    options = {"return_grads": setup.return_grads, "donate": donate, "skip": setup.skip_nonfinite}
    learn = functools.partial(make_train, input_gradient=False, **options)
    return BlockPropParts(
        forwards=tuple(play(cache.make_gluing(stages[k], if_due=skip), shardings[k]) for k in blocks[:-1]),
        memories=tuple(cache.make_memory(own.h_every, shardings[k], donate=donate) for k in blocks),
        h_steps=tuple(make_h_step(stages[k], J[k], own, k, shardings[k]) for k in blocks[1:]),
        learns=tuple(
            learn(stages[k : k + 1], J[k], optimizers[k : k + 1], shardings[k], metrics_fn=metrics[k]) for k in blocks
        ),
    )


def make_h_step(stage: Stage, J: Callable, own: Gluing, k: int, sharding: Sharding | None) -> Callable:
    """``(params, model_state, stream, h, above, p, due) -> h``: one gradient step on L_k, equation (5); k from 0.

    ``above`` is h*_{k+1}, or the targets. If ``due`` is given, only the examples that are due move.
    """
    penalty_below, rate = own.penalty[k - 1], own.rates[k - 1]

    def h_step(params: Any, model_state: Any, stream: KeyStream, h: Any, above: Any, p: Any, due: Any) -> PyTree:
        key = stream.at()

        def L(h: PyTree) -> Array:
            out, _ = stage.apply(params, model_state, h, key=key, train=True)
            loss = J(out, above)
            return jax.tree.leaves(h)[0].shape[0] * (loss.astype(wide(loss.dtype)) + penalty_below * gluing_loss(h, p))

        move = lambda h: jax.tree.map(lambda a, slope: a - rate * slope, h, jax.grad(L)(h))
        return move(h) if due is None else cache.move_due(due, move, h, skip=own.h_every > 1)

    return jax.jit(h_step, out_shardings=sharding)


def step(
    own: Gluing, setup: Setup, parts: BlockPropParts, state: BlockPropState, batch: Batch
) -> tuple[BlockPropState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now, K = Iteration(setup, state, batch, any_size=True), len(setup.stages)
    cache.check_index(own.cache_size, batch)
    kept, visits = list(state.cache), list(state.visits)
    unset: list[Any] = [None] * K
    index, due, p, h, above = (unset.copy() for _ in range(5))

    # Forward, one block after the other. Block 1 has nothing to recall: its cache and its p are empty.
    h[0], p[0] = now.send(batch.inputs, 0), ()
    for k in range(K):
        if k > 0:
            x = (h[k - 1], due[k - 1]) if own.h_every > 1 else h[k - 1]
            out, *_ = parts.forwards[k - 1](now.params[k - 1], now.model_state[k - 1], now.streams[k - 1], x)
            h[k] = p[k] = now.send(out, k)
        if own.cache_size:
            index[k], (recall, _) = now.send(batch.index, k), parts.memories[k]
            recalled, due[k], visits[k] = recall(visits[k], kept[k], index[k], p[k])
            h[k] = recalled if k > 0 else h[k]

    # h-step, from the last block to the second; each result is sent to the block below.
    above[-1] = now.send(batch.targets, K - 1)
    for k in reversed(range(1, K)):
        for _ in range(own.h_steps):
            h[k] = parts.h_steps[k - 1](now.params[k], now.model_state[k], now.streams[k], h[k], above[k], p[k], due[k])
        above[k - 1] = now.send(h[k], k - 1)

    # W-step: no block waits for another's. The last one's loss is the step's.
    for k in range(K):
        now.train(parts.learns[k], h[k], above[k], stages=slice(k, k + 1))
        if own.cache_size and k > 0:
            kept[k] = parts.memories[k][1](kept[k], index[k], h[k])

    return now.finish(state, cache=kept, visits=visits)


def _for_each_cut(name: str, value: Any, K: int) -> tuple[float, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy or JAX
    values = tuple(value) if isinstance(value, Iterable) else (value,) * (K - 1)
    for one in values if isinstance(value, Iterable) else (value,):
        if not isinstance(one, numbers.Real) or isinstance(one, bool) or not 0 < float(one) < math.inf:
            raise ValueError(f"{name} = {value!r} must be a finite number above 0, or a sequence of such numbers.")
    if len(values) != K - 1:
        raise ValueError(f"{name} has {len(values)} entries; K = {K} stages have {K - 1} gluing variables, one each.")
    return tuple(map(float, values))


def check_own(K: int, penalty: Any, h_steps: int, h_learning_rate: Any, cache_size: int | None, h_every: int) -> Gluing:
    """Checks BlockProp's own arguments, and brings them to one entry a gluing variable; raises ValueError."""
    check_count("h_steps", h_steps, 0)
    check_count("h_every", h_every)
    if cache_size is not None:
        check_count("cache_size", cache_size)
    if h_every > 1 and cache_size is None:
        raise ValueError(
            f"h_every = {h_every} needs what earlier visits kept: pass cache_size, the number of examples."
        )
    rates = _for_each_cut("h_learning_rate", h_learning_rate, K)
    return Gluing(_for_each_cut("penalty", penalty, K), h_steps, rates, cache_size, h_every)


def blockprop(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    penalty: float | Sequence[float] = 1.0,
    h_steps: int = 1,
    h_learning_rate: float | Sequence[float] = 0.01,
    cache_size: int | None = None,
    h_every: int = 1,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """BlockProp (Gotmare, Thomas, Brea, Jaggi 2018), Algorithm 1; with ``cache_size`` Algorithm 2.

    With one h-step from h_k = p_k, block 1's gradient is back-propagation's times 2 lambda_{k-1} gamma_k for each
    k = 2..K: the same where 2 lambda gamma = 1, a factor of 0.02 for each cut with the paper's values, the defaults;
    float32 carries that over about four cuts. Many h-steps need gamma_k < 1 / lambda_{k-1}, or they diverge. From K = 3
    on they do not minimise over all h_k together, as Theorem 5.1 has it: then large penalties alone do not lead to the
    gradient of back-propagation. Gluing variables are float32 or wider, whatever the blocks compute in.

    Args:
      stages: the K blocks.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all blocks, or a sequence of K. Each block runs its own: a global norm to
        clip by is that of the block's gradient. ``update`` receives ``value=J_k``.
      penalty: lambda_1..lambda_{K-1}, or one for all. lambda_k holds b_k(h_k) and h_{k+1} together.
      h_steps: N_h, gradient steps on each gluing variable; with 0 only block K learns.
      h_learning_rate: gamma_2..gamma_K, their step sizes, or one for all; of an example's own L_k, for any batch size.
      cache_size: N, keeps h*_k ``(N, ...)`` of each example on block k's device. ``batch.index`` ``(B,)`` says which
        they are; one outside 0..N-1 is new each time and not kept, one twice in a batch keeps either value.
      h_every: E, an example's h-step runs on its visits 0, E, 2E, ..; else h*_k is the kept value. A mini-batch with
        none due skips forward pass and h-step: all blocks work at once. (A CPU computes an h-step with convolutions.)
      placement: one sharding per block (:func:`fr_jax.placement`); None puts all on the default device.
      return_grads: also return each block's dJ_k/dw_k in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics, computed by block K from h*_K.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights, optimizer and
        statistics stay as they are. ``Info.metrics["skipped/k"]`` is then 1, else 0.

    Returns:
      The algorithm. ``Info.loss`` is J_K, at h*_K: lower than the network's own loss. Its metrics hold
      ``gluing_loss/k``, the mean of ||h*_{k+1} - b_k(h*_k)||^2. K = 1 is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers, shardings, penalties or rates, one not above 0, a count too
        small, ``h_every`` without ``cache_size``; from ``init`` and ``step`` on a batch or index that does not fit.

    Example:
      >>> import flax.linen as nn, fr_jax as fr, jax, jax.numpy as jnp, optax
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.blockprop(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1), h_learning_rate=0.5)
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state, info = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> sorted(info.metrics)
      ['gluing_loss/1', 'gradient_norm/1', 'gradient_norm/2']
    """
    setup = check_setup(
        stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn, skip_nonfinite=skip_nonfinite
    )
    own = check_own(len(setup.stages), penalty, h_steps, h_learning_rate, cache_size, h_every)
    return make_algorithm(
        setup, functools.partial(init, own), functools.partial(step, own), lambda: make_parts(setup, own)
    )
