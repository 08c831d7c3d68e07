"""Features replay with barriers: the numbers of ``fr_jax.features_replay``, from a step loop that waits.

All K stages play, one after the other, and the loop waits; then stage K goes backward while the others replay, and the
loop waits again, as implementations do that wait for results in every iteration. It exists to be timed beside the data
flow (``features_replay_lockstep`` in ``simulation/schedules.py``); do not train with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding

from fr_jax._placement import replicated
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms import features_replay
from fr_jax.algorithms._losses import loss_of
from fr_jax.algorithms._microbatches import Shared
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._validation import Optimizers, Setup, check_setup
from fr_jax.algorithms._vjp import with_weights
from fr_jax.algorithms.features_replay import FeaturesReplayState
from fr_jax.distributed import group
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, PyTree, Stage

__all__ = ["LockstepParts", "barrier", "init", "lockstep", "make_parts", "step"]

OPTIONS = features_replay.Options()
init = functools.partial(features_replay.init, OPTIONS)


class LockstepParts(NamedTuple):
    """The jitted functions; ``forward`` and ``backward`` are stage K's."""

    plays: tuple[Callable, ...]
    replays: tuple[Callable, ...]
    forward: Callable
    backward: Callable
    shared: Shared


def make_parts(setup: Setup) -> LockstepParts:
    """Those of features replay, except for stage K, whose one pass is divided at the barrier."""
    here, K = replicated(setup.shardings[-1]), len(setup.stages)
    free = features_replay.make_parts(OPTIONS, setup)

    def backward(vjp: Callable, outputs: PyTree, targets: Array, params: PyTree) -> tuple[Array, PyTree, PyTree]:
        loss, delta = jax.value_and_grad(lambda y: loss_of(setup.loss_fn, y, targets))(outputs)
        grads, *delta_in = with_weights(vjp, params)(delta)
        return loss, grads, delta_in[0] if K > 1 else None

    return LockstepParts(
        plays=free.plays,
        replays=free.replays,
        forward=functions.make_forward(setup.stages[-1], input_gradient=K > 1, keep_weights=False),
        backward=jax.jit(backward, out_shardings=(here, here, setup.shardings[-1])),
        shared=free.shared,
    )


def step(
    setup: Setup, parts: LockstepParts, state: FeaturesReplayState, batch: Batch
) -> tuple[FeaturesReplayState, Info]:
    """Iteration t."""
    now, K = Iteration(setup, state, batch, parts.shared, any_size=False), len(setup.stages)
    history, deltas = list(state.history), list(state.deltas)

    h = now.send(batch.inputs, 0)
    for k in range(K - 1):
        history[k] = fifo.push(history[k], h)
        h = now.play(k, parts.plays[k], h)
    outputs, vjp = now.forward(K - 1, parts.forward, h)
    barrier((outputs, now.model_state, now.streams))

    targets = now.send(batch.targets, K - 1)
    now.loss, now.sums[-1], delta = parts.backward(vjp, outputs, targets, now.params[-1])
    now.update(K - 1)
    for k in reversed(range(K - 1)):
        if delta is not None:  # of stage k+1, for the next iteration: this one replays with state.deltas
            deltas[k] = now.send(delta, k)
        h_s, history[k] = fifo.pop(history[k])
        delta = None
        if now.t + (k + 1) - K >= 0:
            delta = now.replay(k, parts.replays[k], h_s, state.deltas[k], state.losses[k])
    state, info = now.finish(state, history=history, deltas=deltas)
    barrier((state, info))
    return state, info


def barrier(tree: Any) -> None:
    """Waits until this process's arrays in ``tree`` are computed, and until all processes are here."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    jax.block_until_ready([shard.data for x in arrays for shard in x.addressable_shards])
    group().exchange(None)


def lockstep(
    stages: Sequence[Stage], loss_fn: LossFn, optimizer: Optimizers, *, placement: Sequence[Sharding] | None = None
) -> Algorithm:
    """Features replay in lock step, with donated buffers; arguments as for :func:`fr_jax.features_replay`."""
    setup = check_setup(stages, loss_fn, optimizer, placement, donate=True)
    return make_algorithm(setup, init, step, lambda: make_parts(setup))
