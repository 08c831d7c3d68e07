"""The jitted functions that the methods issue for each module, with arguments to call them with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax._arrays import place, put
from fr_jax._placement import replicated
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms import dni, gpipe
from fr_jax.algorithms._stages import KeyStream, init_layer, init_stages
from fr_jax.algorithms._validation import Setup
from fr_jax.types import Batch, LossFn, PyTree, Stage

__all__ = ["Call", "Module", "Synthesizers", "calls_of", "run_once"]


class Call(NamedTuple):
    """A function and what it is called with; both stay usable after a timed call, which works on copies."""

    run: Callable
    arguments: tuple

    def seconds(self) -> float:
        """From the call to the result."""
        copies = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, self.arguments)
        jax.block_until_ready(copies)
        start = time.perf_counter()
        jax.block_until_ready(self.run(*copies))
        return time.perf_counter() - start


class Synthesizers(NamedTuple):
    """K-1 stages, and their optimizer."""

    stages: tuple[Stage, ...]
    optimizer: optax.GradientTransformation


class Module(NamedTuple):
    """One module with everything that its functions are called with; names as in ``fr_jax.algorithms._functions``."""

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    stream: KeyStream
    h_in: PyTree
    h_out: PyTree
    vjp: Any
    delta: PyTree
    grads: PyTree


def run_once(setup: Setup, loss_fn: LossFn, batch: Batch, *, keep_weights: bool) -> list[Module]:
    """Every module, after one step of back-propagation without updates; ``keep_weights``: of the VJPs."""
    stages, shardings = setup.stages, setup.shardings
    K = len(stages)
    made = init_stages(setup, jax.random.key(0), batch)
    own = list(zip(made.params, made.model_state, made.opt_state, made.streams, strict=True))
    h, sides = batch.inputs, []
    for k in range(K - 1):
        params, state, _, stream = own[k]
        forward = steps.make_forward(stages[k], input_gradient=k > 0, keep_weights=keep_weights)
        h_out, vjp, _, _ = forward(params, state, stream, h)
        sides.append((h, h_out, vjp))
        h = put(h_out, shardings[k + 1])
    top = steps.make_loss_gradient(stages[-1], loss_fn, shardings[-1], metrics_fn=None, input_gradient=K > 1)
    params, state, _, stream = own[-1]
    (grads, *_), delta, _, _ = top(params, state, stream, h, batch.targets)
    modules = [Module(*own[-1], h_in=h, h_out=None, vjp=None, delta=None, grads=grads)]
    for k in reversed(range(K - 1)):
        arrived = put(delta, shardings[k])
        h_in, h_out, vjp = sides[k]
        pull = steps.make_pull(shardings[k], input_gradient=k > 0)
        grads, delta = pull(vjp, arrived, () if keep_weights else own[k][0])
        modules.append(Module(*own[k], h_in=h_in, h_out=h_out, vjp=vjp, delta=arrived, grads=grads))
    return modules[::-1]


def calls_of(
    k: int,
    setup: Setup,
    module: Module,
    loss_fn: LossFn,
    targets: PyTree,
    synthesizers: Synthesizers | None,
    wanted: set[str],
    *,
    keep_weights: bool,
) -> dict[str, Call]:
    """Kind -> call, for those ``wanted`` that module k has; its device must be of this process."""
    stage, optimizer, here = setup.stages[k], setup.optimizers[k], setup.shardings[k]
    K, first = len(setup.stages), k == 0
    params, state, opt_state, stream, h_in, _, vjp, delta, grads = module
    run = (params, state, stream, h_in)
    common: dict[str, Any] = {"return_grads": False, "donate": True}
    accumulate = gpipe.make_accumulate(here, count=2)
    makers: dict[str, Callable[[], Call]] = {
        "update": lambda: Call(steps.make_update(optimizer, here, donate=True), (params, opt_state, grads)),
        "accumulate": lambda: Call(accumulate, (accumulate(None, grads), grads)),
    }
    if k < K - 1:
        replay = lambda: steps.make_replay(
            stage, optimizer, here, staleness=K - 1 - k, input_gradient=not first, update_stats=False, **common
        )
        forward = lambda: steps.make_forward(stage, input_gradient=not first, keep_weights=keep_weights)
        pulled = (vjp, delta, () if keep_weights else params)
        makers |= {
            "play": lambda: Call(steps.make_play(stage, here, update_stats=True, donate=True), run),
            "replay": lambda: Call(replay(), (params, state, opt_state, stream, h_in, delta)),
            "forward": lambda: Call(forward(), run),
            "backward": lambda: Call(steps.make_pull(here, input_gradient=not first), pulled),
        }
        if synthesizers is not None:
            makers |= _synthesizer_calls(k, synthesizers, here, module)
    else:
        last = lambda: steps.make_train(
            [stage], loss_fn, [optimizer], here, metrics_fn=None, input_gradient=not first, **common
        )
        gradient = lambda: steps.make_loss_gradient(stage, loss_fn, here, metrics_fn=None, input_gradient=not first)
        makers |= {
            "last": lambda: Call(last(), ((params,), (state,), (opt_state,), (stream,), h_in, targets)),
            "gradient": lambda: Call(gradient(), (*run, targets)),
        }
    return {kind: make() for kind, make in makers.items() if kind in wanted}


def _synthesizer_calls(
    k: int, own: Synthesizers, sharding: Sharding | None, module: Module
) -> dict[str, Callable[[], Call]]:
    here, h = replicated(sharding), module.h_out
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), h)
    key, count = place((jax.random.key(k), jnp.zeros((), jnp.int32)), here)
    params, state = init_layer(own.stages[k], key, spec, here)
    opt_state = jax.jit(own.optimizer.init, out_shardings=here)(params)
    synthesize = steps.make_forward(own.stages[k], input_gradient=False)
    predicted, vjp, _, _ = synthesize(params, state, KeyStream(key, count), h)
    error, update = dni.make_error(sharding), steps.make_update(own.optimizer, sharding, donate=True)

    def learn(vjp: Callable, predicted: PyTree, delta: PyTree, params: PyTree, opt_state: PyTree) -> Any:
        grads, _ = error(vjp, predicted, delta)
        return update(params, opt_state, grads)

    return {
        "synthesize": lambda: Call(synthesize, (params, state, KeyStream(key, count), h)),
        "learn": lambda: Call(learn, (vjp, predicted, module.delta, params, opt_state)),
    }
