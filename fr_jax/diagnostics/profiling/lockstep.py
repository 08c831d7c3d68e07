"""Features replay with barriers: the numbers of ``fr_jax.features_replay``, by a step loop that waits.

All K stages play, one after the other, and the loop waits; then stage K goes backward while the others replay, and
the loop waits again. Implementations that wait for results in every iteration run like this. It exists to be timed
beside the data flow (``features_replay_lockstep`` in ``simulation/schedules.py``); do not train with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fr_jax._placement import replicated
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms import features_replay
from fr_jax.algorithms._losses import loss_of
from fr_jax.algorithms._step import Iteration
from fr_jax.algorithms._validation import Setup
from fr_jax.algorithms._vjp import with_weights
from fr_jax.algorithms.features_replay import FeaturesReplayState
from fr_jax.distributed import group
from fr_jax.types import Array, Batch, LossFn, PyTree

__all__ = ["Parts", "barrier", "init", "make_parts", "step"]


def init(setup: Setup, key: Array, batch: Batch) -> FeaturesReplayState:
    """The state of features replay before its first step."""
    return features_replay.init(setup, None, key, batch, None, None)


class Parts(NamedTuple):
    """The jitted functions: K-1 plays and replays, and stage K's forward pass, backward pass and update."""

    plays: tuple[Callable, ...]
    replays: tuple[Callable, ...]
    forward: Callable
    backward: Callable
    update: Callable


def make_parts(setup: Setup, loss_fn: LossFn) -> Parts:
    """Those of features replay, with donated buffers, but for stage K, whose one pass is divided at the barrier."""
    stages, optimizers, shardings = setup.stages, setup.optimizers, setup.shardings
    here, K = replicated(shardings[-1]), len(stages)
    free = features_replay.make_parts(dataclasses.replace(setup, loss_fn=loss_fn, donate=True), "play", 0.0)

    def backward(vjp: Callable, outputs: PyTree, targets: Array, params: PyTree) -> tuple[Array, PyTree, PyTree]:
        loss, delta = jax.value_and_grad(lambda y: loss_of(loss_fn, y, targets))(outputs)
        grads, *delta_in = with_weights(vjp, params)(delta)
        return loss, grads, delta_in[0] if K > 1 else None

    return Parts(
        plays=free.plays,
        replays=free.replays,
        forward=steps.make_forward(stages[-1], input_gradient=K > 1, keep_weights=False),
        backward=jax.jit(backward, out_shardings=(here, here, shardings[-1])),
        update=steps.make_update(optimizers[-1], shardings[-1], donate=True),
    )


def step(parts: Parts, setup: Setup, state: FeaturesReplayState, batch: Batch) -> tuple[FeaturesReplayState, Array]:
    """Iteration t and its loss; the processes of a group wait for each other, too."""
    now, K = Iteration(setup, state, batch, any_size=False), len(setup.stages)
    history, deltas, losses = list(state.history), list(state.deltas), list(state.losses)

    h = now.send(batch.inputs, 0)
    for k in range(K - 1):
        history[k] = fifo.push(history[k], h)
        h = now.play(k, parts.plays[k], h)
    outputs, vjp = now.forward(K - 1, parts.forward, h)
    barrier((outputs, now.model_state, now.streams))

    now.loss, grads, delta = parts.backward(vjp, outputs, now.send(batch.targets, K - 1), now.params[-1])
    now.update(K - 1, parts.update, grads)
    for k in reversed(range(K - 1)):
        if delta is not None:
            deltas[k] = now.send(delta, k)
        h_s, history[k] = fifo.pop(history[k])
        delta = None
        if now.t + (k + 1) - K >= 0:
            delta = now.replay(k, parts.replays[k], h_s, state.deltas[k], state.losses[k])
    state, info = now.finish(state, history=history, deltas=deltas, losses=losses)
    barrier((state, info.loss))
    return state, info.loss


def barrier(tree: Any) -> None:
    """Waits until this process's arrays in ``tree`` are computed, and until all processes are here."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    jax.block_until_ready([shard.data for x in arrays for shard in x.addressable_shards])
    group().exchange(None)
