"""Measures stage times while a method that waits runs: every function in its place in the step, one at a time a device.

Timed alone and again and again, a function of back-propagation or GPipe is faster than in a step, where its inputs come
from another core's memory, its device has just been idle, and the VJPs of other microbatches are alive. So here the
step itself runs, and each of its functions is waited for: before it, for what it reads; after it, for its result. The
sum of what is measured is not a step's time: nothing overlaps. The schedule says what does.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from fr_jax._arrays import place
from fr_jax.algorithms import backprop, gpipe
from fr_jax.algorithms._validation import Optimizers, Setup, check_count, check_setup
from fr_jax.diagnostics.profiling import lockstep
from fr_jax.diagnostics.profiling.stage_calls import run_once
from fr_jax.diagnostics.profiling.stage_times import Measured, crossings, exchanged, is_mine
from fr_jax.distributed import group
from fr_jax.types import Batch, LossFn, Stage

__all__ = ["step_timer"]

WARM_UP = 2


class Clock:
    """Collects the seconds of calls by module and kind; calls of modules on other processes are only issued."""

    def __init__(self, shardings: Sequence[Sharding | None]) -> None:
        self._mine = [is_mine(sharding) for sharding in shardings]
        self.seconds: dict[tuple[int, str], list[float]] = defaultdict(list)

    def around(self, run: Callable, k: int, kind: str) -> Callable:
        """The same function, timed from its inputs to its result."""
        if not self._mine[k]:
            return run

        def timed(*arguments: Any) -> Any:
            jax.block_until_ready(arguments)
            start = time.perf_counter()
            result = jax.block_until_ready(run(*arguments))
            self.seconds[k, kind].append(time.perf_counter() - start)
            return result

        return timed

    def all_around(self, runs: Sequence[Callable], kind: str) -> tuple[Callable, ...]:
        """Those of modules 0, 1, ..."""
        return tuple(self.around(run, k, kind) for k, run in enumerate(runs))


def step_timer(
    method: str,
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    batch: Batch,
    *,
    placement: Sequence[Sharding] | None = None,
    microbatches: int = 4,
    repeats: int = 3,
    hops: int = 10,
) -> Callable[[], Measured]:
    """Prepares a measurement of stage times in a method's own step.

    Args:
      method: ``"bp"`` (back-propagation over several devices), ``"gpipe"``, or ``"fr-lockstep"`` (features replay with
        barriers, :mod:`fr_jax.diagnostics.profiling.lockstep`).
      stages: the K modules.
      loss_fn: ``(outputs, targets) -> scalar``.
      optimizer: one optax transformation, or K.
      batch: the mini-batch.
      placement: one sharding a module; None puts all on the default device.
      microbatches: M, of GPipe.
      repeats: steps in a measurement, of which the median counts; where a step calls a function M times, their mean.
      hops: there-and-back journeys of a feature in a measurement of the transfers.

    Returns:
      A function that measures; GPipe's times are those of a microbatch. In a run of several processes all must call it.

    Raises:
      ValueError: another method, a wrong number of stages, optimizers or shardings, ``repeats`` or ``hops`` less than
        1, a batch that cannot be split, or back-propagation on a single device, which is one function.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 8)))
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8, num_classes=8), (1,))
      >>> loss_fn = lambda y, z: jnp.mean((y - z) ** 2)
      >>> measure = step_timer("gpipe", stages, loss_fn, optax.sgd(0.1), batch, microbatches=2)
      >>> times, _ = measure()
      >>> times.stages[0].forward > 0, times.stages[1].gradient > 0
      (True, True)
    """
    setup = check_setup(stages, optimizer, placement, loss_fn=loss_fn, donate=True)
    check_count("repeats", repeats)
    check_count("hops", hops)
    if method not in STEPS:
        raise ValueError(f"method = {method!r} has no step timer; it can be {', '.join(STEPS)}. Others: stage_timer.")
    if method == "bp" and len(set(setup.shardings)) == 1:
        raise ValueError("back-propagation on a single device is one function: time it with stage_timer, kind 'last'.")
    clock = Clock(setup.shardings)
    parts = microbatches if method == "gpipe" else 1
    part = Batch(*(x[: len(x) // parts] for x in (batch.inputs, batch.targets)))
    batch = Batch(place(batch.inputs, setup.shardings[0]), place(batch.targets, setup.shardings[-1]))
    step, state = STEPS[method](setup, loss_fn, batch, clock, microbatches)
    part = Batch(place(part.inputs, setup.shardings[0]), place(part.targets, setup.shardings[-1]))
    features = [module.h_out for module in run_once(setup, loss_fn, part, keep_weights=False)[:-1]]
    warm_up = max(WARM_UP, len(setup.stages))  # until all modules replay

    def measure() -> Measured:
        nonlocal state
        rounds: list[dict[tuple[int, str], float]] = []
        for number in range(warm_up + repeats):
            clock.seconds.clear()
            group().exchange(None)
            state, info = step(state, batch)
            jax.block_until_ready([x for x in jax.tree.leaves((state, info)) if _is_here(x)])
            if number >= warm_up:
                rounds.append({name: statistics.fmean(seconds) for name, seconds in clock.seconds.items()})
        mine = [(*name, statistics.median(one[name] for one in rounds)) for name in rounds[0]]
        return exchanged(len(setup.stages), mine, crossings(features, setup.shardings, hops))

    return measure


def _is_here(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.is_fully_addressable


def _backprop(setup: Setup, loss_fn: LossFn, batch: Batch, clock: Clock, M: int) -> tuple[Callable, Any]:
    parts = backprop.make_parts(setup)
    parts = parts._replace(
        forwards=clock.all_around(parts.forwards, "forward"),
        pulls=clock.all_around(parts.pulls, "backward"),
        updates=clock.all_around(parts.updates, "update"),
        last=clock.around(parts.last, len(setup.stages) - 1, "last"),
    )
    state = backprop.init(setup, parts, jax.random.key(0), batch, None, None)
    return lambda state, batch: backprop.step(setup, parts, state, batch), state


def _gpipe(setup: Setup, loss_fn: LossFn, batch: Batch, clock: Clock, M: int) -> tuple[Callable, Any]:
    parts = gpipe.make_parts(setup, M)
    parts = parts._replace(
        forwards=clock.all_around(parts.forwards, "forward"),
        pulls=clock.all_around(parts.pulls, "backward"),
        last=clock.around(parts.last, len(setup.stages) - 1, "gradient"),
        accumulates=clock.all_around(parts.accumulates, "accumulate"),
        updates=clock.all_around(parts.updates, "update"),
    )
    state = gpipe.init(M, setup, parts, jax.random.key(0), batch, None, None)
    return lambda state, batch: gpipe.step(M, setup, parts, state, batch), state


def _lockstep(setup: Setup, loss_fn: LossFn, batch: Batch, clock: Clock, M: int) -> tuple[Callable, Any]:
    parts, top = lockstep.make_parts(setup, loss_fn), len(setup.stages) - 1
    parts = lockstep.Parts(
        plays=clock.all_around(parts.plays, "play"),
        replays=clock.all_around(parts.replays, "replay"),
        forward=clock.around(parts.forward, top, "forward"),
        backward=clock.around(parts.backward, top, "backward"),
        update=clock.around(parts.update, top, "update"),
    )
    state = lockstep.init(setup, jax.random.key(0), batch)
    return lambda state, batch: lockstep.step(parts, setup, state, batch), state


STEPS = {"bp": _backprop, "gpipe": _gpipe, "fr-lockstep": _lockstep}
