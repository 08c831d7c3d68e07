"""Measures what schedules are made from: each stage's own jitted functions on its device, and the transfers.

A function is timed alone, again and again, or in its place in the method's step. Alone, all processes can work at the
same time, as they do in a method without locking. But a function of back-propagation or GPipe is faster alone than in a
step, where its inputs come from another core's memory, its device has just been idle, and the VJPs of other
micro-batches are alive: time these in the step. Each function is waited for there, so the sum is not a step's time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Sharding

from fr_jax._arrays import place, put
from fr_jax.algorithms import dni
from fr_jax.algorithms._validation import Optimizers, Setup, check_count, check_setup
from fr_jax.diagnostics.profiling.watched_steps import (
    STEPS,
    Watched,
    is_mine,
    microbatches_of,
    recorded_calls,
    watched_step,
)
from fr_jax.diagnostics.simulation.times import StageTimes, Times
from fr_jax.distributed import group
from fr_jax.types import Batch, LossFn, PyTree, Stage

__all__ = ["Measured", "median", "stage_timer"]

WARM_UP = 2


class Measured(NamedTuple):
    """One measurement.

    Attributes:
      times: seconds; NaN for kinds that the methods do not have.
      transfer_share: the part of a transfer's time, 0 to 1, for which a sender or receiver on a CPU is busy with it
        (:func:`fr_jax.diagnostics.simulation.timeline.occupying`); 0 for other devices, and without transfers.
    """

    times: Times
    transfer_share: float


def stage_timer(
    methods: Sequence[str],
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    batch: Batch,
    *,
    in_step: bool = False,
    placement: Sequence[Sharding] | None = None,
    microbatches: int | None = None,
    synthesizers: Stage | Sequence[Stage] | None = None,
    synthesizer_optimizer: optax.GradientTransformation | None = None,
    repeats: int = 3,
    hops: int = 10,
) -> Callable[[], Measured]:
    """Prepares a measurement: makes the methods' functions, with donated buffers, and calls them.

    A function is timed from the call to the result, a transfer as a ping-pong of the feature between two stages; the
    median of ``repeats`` counts. What is not described here is as for the methods. In a run of several processes all
    must call the function that measures.

    ``methods`` are keys of :data:`STEPS`; kinds of functions that several of them have are measured once, and without
    methods the transfers alone. With ``in_step``, functions are timed in their places in the step of the one method
    that is given. Otherwise the processes of a run measure at the same time, and slow each other down by what they
    share (memory). A feature goes there and back ``hops`` times. With ``microbatches`` (4 by default for GPipe, 1 for
    the others) times are those of a micro-batch, and ``update`` of one update.

    Raises:
      ValueError: as the methods, and for an unknown method, methods with other numbers of micro-batches, ``repeats`` or
        ``hops`` less than 1, or back-propagation of several stages on a single device, which is one function.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fr_jax as fr
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 8)))
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8, num_classes=8), (1,))
      >>> loss_fn = lambda y, z: jnp.mean((y - z) ** 2)
      >>> times, share = stage_timer(["fr"], stages, loss_fn, optax.sgd(0.1), batch, repeats=1)()
      >>> times.stages[0].replay > 0 and times.stages[1].last > 0, times.features, share
      (True, (0.0,), 0.0)
    """
    setup = check_setup(stages, loss_fn, optimizer, placement, donate=True)
    shardings = setup.shardings
    check_count("repeats", repeats)
    check_count("hops", hops)
    _check_methods(methods, setup, in_step)
    if microbatches is not None:
        check_count("microbatches", microbatches)
    counts = {microbatches_of(method, microbatches) for method in methods}
    if len(counts) > 1:
        raise ValueError(f"methods = {methods!r} have {sorted(counts)} micro-batches; measure them one by one.")
    parts = max(counts, default=1)
    own: dict[str, Any] = {"microbatches": microbatches}
    if "dni" in methods:
        if synthesizers is None or synthesizer_optimizer is None:
            raise ValueError("method 'dni' needs synthesizers and synthesizer_optimizer; pass both.")
        own["synthesizers"] = dni.check_synthesizers(synthesizers, synthesizer_optimizer, False, len(setup.stages))
    batch = Batch(place(batch.inputs, shardings[0]), place(batch.targets, shardings[-1]))
    if in_step:
        timed = _in_step(methods[0], setup, batch, repeats, own)
    else:
        timed = _alone(methods, setup, batch, repeats, own)
    sent = _features(setup.stages, jax.tree.map(lambda x: x[: x.shape[0] // parts], batch.inputs), shardings)

    def measure() -> Measured:
        seconds = timed()
        crossings = [_ping_pong(h, shardings[k], shardings[k + 1], hops) for k, h in enumerate(sent)]
        return _exchanged(len(setup.stages), seconds, crossings)

    return measure


def _check_methods(methods: Sequence[str], setup: Setup, in_step: bool) -> None:
    unknown = [method for method in methods if method not in STEPS]
    if isinstance(methods, str) or unknown:
        raise ValueError(f"methods = {methods!r} were given; give a sequence, each one of {', '.join(STEPS)}.")
    if in_step and len(methods) != 1:
        raise ValueError(f"methods = {methods!r} were given with in_step = True; give one method.")
    if "bp" in methods and len(setup.stages) > 1 and len(set(setup.shardings)) == 1:
        raise ValueError("back-propagation on a single device is one function: give the network as one stage.")


def _alone(
    methods: Sequence[str], setup: Setup, batch: Batch, repeats: int, own: dict[str, Any]
) -> Callable[[], dict[Watched, float]]:
    recorded = recorded_calls(methods, setup, batch, **own)
    jobs = [(watched, call) for watched, calls in recorded.items() for call in calls]

    def measure() -> dict[Watched, float]:
        for _, call in jobs:  # to warm up
            call.seconds()
        group().exchange(None)  # all processes measure at the same time, as they work in a step
        # Round after round, and the median of each function: what disturbs one round does not count.
        rounds = [[call.seconds() for _, call in jobs] for _ in range(repeats)]
        found = defaultdict(list)
        for (watched, _), column in zip(jobs, zip(*rounds, strict=True), strict=True):
            found[watched].append(statistics.median(column))
        return {watched: statistics.fmean(seconds) for watched, seconds in found.items()}

    return measure


def _in_step(
    method: str, setup: Setup, batch: Batch, repeats: int, own: dict[str, Any]
) -> Callable[[], dict[Watched, float]]:
    seconds: dict[Watched, list[float]] = defaultdict(list)

    def watch(run: Callable, watched: Watched) -> Callable:
        def timed(*arguments: Any) -> Any:
            # Without this wait a function would be charged for the one that makes its inputs.
            jax.block_until_ready(arguments)
            start = time.perf_counter()
            result = jax.block_until_ready(run(*arguments))
            seconds[watched].append(time.perf_counter() - start)
            return result

        return timed

    step, state = watched_step(method, setup, batch, watch, **own)
    warm_up = max(WARM_UP, len(setup.stages))  # until all stages replay

    def measure() -> dict[Watched, float]:
        nonlocal state
        rounds: list[dict[Watched, float]] = []
        for number in range(warm_up + repeats):
            seconds.clear()
            group().exchange(None)
            state, info = step(state, batch)
            arrays = [x for x in jax.tree.leaves((state, info)) if isinstance(x, jax.Array)]
            jax.block_until_ready([x for x in arrays if x.is_fully_addressable])
            if number >= warm_up:
                rounds.append({watched: statistics.fmean(each) for watched, each in seconds.items()})
        return {watched: statistics.median(one[watched] for one in rounds) for watched in rounds[0]}

    return measure


def _exchanged(K: int, mine: Mapping[Watched, float], crossing: Sequence[tuple[float, float]]) -> Measured:
    """What all processes have measured, each of its own stages; all must call it."""
    table: list[dict[str, float]] = [defaultdict(float) for _ in range(K)]
    for (k, kind, _), seconds in (row for rows in group().exchange([*mine.items()]) for row in rows):
        table[k][kind] += seconds  # a kind may be two functions
    seconds = tuple(one for one, _ in crossing)
    shares = [share for one, share in crossing if one > 0]
    times = Times(tuple(StageTimes(**own) for own in table), seconds, seconds)
    return Measured(times, statistics.fmean(shares) if shares else 0.0)


def _features(stages: Sequence[Stage], inputs: PyTree, shardings: Sequence[Sharding]) -> list[PyTree]:
    """Zeros like h_k for k < K, each on its stage's devices, from shapes alone."""
    found, h = [], jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    for stage, sharding in zip(stages[:-1], shardings[:-1], strict=True):
        params, state = jax.eval_shape(stage.init, jax.random.key(0), h)
        h, _ = jax.eval_shape(stage.apply, params, state, h)
        found.append(place(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), h), sharding))
    return found


def _ping_pong(h: PyTree, here: Sharding, there: Sharding, hops: int) -> tuple[float, float]:
    """The seconds of one way, and the share of them for which the processors at the ends are busy."""
    if here == there:
        return 0.0, 0.0
    # Not timed: the first transfer between two processes may have to connect them.
    put(put(h, there), here)
    group().exchange(None)
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(hops):
        h = put(put(h, there), here)
    if is_mine(here):
        jax.block_until_ready(h)
    seconds = time.perf_counter() - start if is_mine(here) else math.nan
    group().exchange(None)
    # On a GPU the processor only issues the copies: its time says nothing of the device's.
    takes_part = is_mine(here) + is_mine(there)
    on_cpu = all(device.platform == "cpu" for device in here.device_set | there.device_set)
    busy = time.process_time() - busy if on_cpu and takes_part else 0.0
    found = group().exchange([seconds, busy])
    total = next(one for one, _ in found if not math.isnan(one))
    # Both ends are busy: one end's share is half of the sum.
    return total / (2 * hops), min(1.0, sum(busy for _, busy in found) / 2 / total)


def median(measured: Sequence[Measured]) -> Measured:
    """The median of one or more measurements, number by number.

    Example:
      >>> one, two = (Measured(Times((StageTimes(last=s),), (), ()), 0.0) for s in (1.0, 2.0))
      >>> median([one, two, two]).times.stages[0].last
      2.0
    """
    if not measured:
        raise ValueError("the median of no measurements was asked for; give at least one.")
    middle = lambda rows: tuple(statistics.median(column) for column in zip(*rows, strict=True))
    all_times = [one.times for one in measured]
    stages = zip(*(times.stages for times in all_times), strict=True)
    times = Times(
        tuple(StageTimes(*middle(rows)) for rows in stages),
        middle([times.features for times in all_times]),
        middle([times.gradients for times in all_times]),
        statistics.median(times.all_reduce for times in all_times),
    )
    return Measured(times, statistics.median(one.transfer_share for one in measured))
