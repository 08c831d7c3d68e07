"""Features replay with barriers: the numbers of ``fr_jax.features_replay``, by a step loop that waits.

All K modules play, one after the other, and the loop waits; then module K goes backward while the others replay, and
the loop waits again. Implementations that wait for results in every iteration run like this. It exists to be timed
beside the data flow (``features_replay_lockstep`` in ``simulation/schedules.py``); do not train with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fr_jax._arrays import put
from fr_jax._placement import replicated
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms import features_replay
from fr_jax.algorithms._stages import Setup
from fr_jax.algorithms.features_replay import FeaturesReplayState
from fr_jax.distributed import group
from fr_jax.types import Array, Batch, PyTree

__all__ = ["Parts", "barrier", "init", "make_parts", "step"]

init = features_replay.init


class Parts(NamedTuple):
    """The jitted functions: K-1 plays and replays, and module K's forward pass, backward pass and update."""

    plays: tuple[Callable, ...]
    replays: tuple[Callable, ...]
    forward: Callable
    backward: Callable
    update: Callable


def make_parts(setup: Setup, loss_fn: steps.LossFn) -> Parts:
    """Those of features replay, with donated buffers, but for module K, whose one pass is divided at the barrier."""
    stages, optimizers, shardings = setup
    here, K = replicated(shardings[-1]), len(stages)
    free = features_replay.make_parts(
        setup, loss_fn, None, batch_stats="play", weight_prediction=0.0, return_grads=False, donate=True
    )

    def backward(vjp: Callable, outputs: PyTree, targets: Array, params: PyTree) -> tuple[Array, PyTree, PyTree]:
        loss, delta = jax.value_and_grad(lambda y: steps.loss_of(loss_fn, y, targets))(outputs)
        grads, *delta_in = steps.with_weights(vjp, params)(delta)
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
    t, K, shardings = state.step, len(setup.stages), setup.shardings
    params, model_state, opt_state = list(state.params), list(state.model_state), list(state.opt_state)
    history, deltas, streams = list(state.history), list(state.deltas), list(state.streams)

    h = put(batch.inputs, shardings[0])
    for k in range(K - 1):
        history[k] = fifo.push(history[k], h)
        h, model_state[k], count = parts.plays[k](params[k], model_state[k], streams[k], h)
        h = put(h, shardings[k + 1])
        streams[k] = streams[k]._replace(count=count)
    outputs, vjp, model_state[-1], count = parts.forward(params[-1], model_state[-1], streams[-1], h)
    streams[-1] = streams[-1]._replace(count=count)
    barrier((outputs, model_state, streams))

    loss, grads, delta = parts.backward(vjp, outputs, put(batch.targets, shardings[-1]), params[-1])
    params[-1], opt_state[-1], _ = parts.update(params[-1], opt_state[-1], grads)
    for k in reversed(range(K - 1)):
        if delta is not None:
            deltas[k] = put(delta, shardings[k])
        h_s, history[k] = fifo.pop(history[k])
        delta = None
        if t + (k + 1) - K >= 0:
            params[k], _, opt_state[k], delta, _, _ = parts.replays[k](
                params[k], model_state[k], opt_state[k], streams[k], h_s, state.deltas[k]
            )
    state = FeaturesReplayState(
        step=t + 1,
        params=tuple(params),
        model_state=tuple(model_state),
        opt_state=tuple(opt_state),
        history=tuple(history),
        deltas=tuple(deltas),
        streams=tuple(streams),
        batch_spec=state.batch_spec,
    )
    barrier((state, loss))
    return state, loss


def barrier(tree: Any) -> None:
    """Waits until this process's arrays in ``tree`` are computed, and until all processes are here."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    jax.block_until_ready([shard.data for x in arrays for shard in x.addressable_shards])
    group().exchange(None)
