"""Measures the parts of a data-parallel step: one device's share of the mini-batch, and the all-reduces.

The all-reduces are read from the compiled step: gradients, and the statistics of batch normalisation, which are those
of the whole mini-batch, layer after layer.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fr_jax._arrays import place
from fr_jax.algorithms import backprop
from fr_jax.algorithms._validation import Setup, check_count, check_setup
from fr_jax.diagnostics.profiling.stage_times import Measured
from fr_jax.diagnostics.profiling.watched_steps import Call, recorded_calls
from fr_jax.diagnostics.simulation.times import StageTimes, Times
from fr_jax.distributed import group
from fr_jax.types import Batch, LossFn, Stage

__all__ = ["all_reduces", "data_parallel_timer"]

ALL_REDUCE = re.compile(r" = (?P<shapes>\(.*?\)|\S+) all-reduce(-start)?\(")
SHAPE = re.compile(r"(?P<dtype>[a-z]+\d\w*)\[(?P<sizes>[\d,]*)\]")
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s32": "int32", "u32": "uint32"}

SIZE = 128  # of the matrices whose products are the other work: well below a millisecond each
CALIBRATION = 20  # products before each all-reduce, to find out how long one takes


def data_parallel_timer(
    network: Stage,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    *,
    placement: Sharding,
    repeats: int = 3,
) -> Callable[[], Measured]:
    """Prepares a measurement of data parallelism, ``fr_jax.backprop`` on ``fr_jax.placement(1, data_parallel=D)``.

    A device's share is timed as the jitted step of a D-th of the mini-batch, without all-reduces. These are timed one
    after the other, as in the step, each after an equal share of as much other work, by what they add to that work (at
    least what they take alone): an all-reduce of processes that have just computed also waits for the slower one.

    ``network`` is one stage, ``batch`` the whole mini-batch; the median of ``repeats`` timed calls counts.

    Returns:
      A function that measures: ``times.stages[0].last`` are the seconds of the slowest device's share,
      ``times.all_reduce`` those of all all-reduces. In a run of several processes all must call it.

    Raises:
      ValueError: ``placement`` is not over several devices, ``repeats`` is less than 1, or the mini-batch does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fr_jax as fr
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 8)))
      >>> network = fr.chain(*fr.models.mlp(depth=1, num_classes=8))
      >>> (placement,) = fr.placement(1, data_parallel=2)
      >>> loss_fn = lambda y, z: jnp.mean((y - z) ** 2)
      >>> times, _ = data_parallel_timer(network, loss_fn, optax.sgd(0.1), batch, placement=placement)()
      >>> times.stages[0].last > 0, times.all_reduce > 0
      (True, True)
    """
    check_count("repeats", repeats)
    if not isinstance(placement, NamedSharding) or placement.num_devices < 2:
        raise ValueError(
            f"placement = {placement} is not over several devices; give fr_jax.placement(1, data_parallel=D)[0], D > 1."
        )
    setup_on = lambda sharding: check_setup([network], loss_fn, optimizer, [sharding], donate=True)
    found = all_reduces(_compiled_step(setup_on(placement), place(batch, placement)))
    reduce_seconds = _all_reduce_timer(found, placement, repeats)
    part = jax.tree.map(lambda x: x[: len(x) // placement.num_devices], batch)
    calls: list[Call] = []
    for here in map(SingleDeviceSharding, placement.addressable_devices):
        ((call,),) = recorded_calls(["bp"], setup_on(here), place(part, here)).values()
        calls.append(call)

    def measure() -> Measured:
        # To warm up. Then all processes measure at the same time, as they work in a step.
        for call in calls:
            call.seconds()
        group().exchange(None)
        part_seconds = _slowest(max(statistics.median(call.seconds() for _ in range(repeats)) for call in calls))
        stages = (StageTimes(last=part_seconds),)
        return Measured(Times(stages, (), (), all_reduce=reduce_seconds(part_seconds)), 0.0)

    return measure


def all_reduces(compiled: Any) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
    """For each all-reduce of a compiled function (``jax.jit(f).lower(...).compile()``) the arrays that it adds up."""
    # Nothing public tells an executable's collectives: they are read from the text of the optimised HLO (jax 0.11).
    found = []
    for match in ALL_REDUCE.finditer(compiled.as_text()):
        shapes = [(one["dtype"], one["sizes"]) for one in SHAPE.finditer(match["shapes"])]
        if unknown := {dtype for dtype, _ in shapes} - set(DTYPES):
            raise ValueError(f"an all-reduce of {', '.join(sorted(unknown))}; known are {', '.join(DTYPES)}.")
        sized = [(tuple(map(int, filter(None, sizes.split(",")))), DTYPES[dtype]) for dtype, sizes in shapes]
        found.append(tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in sized))
    return found


def _compiled_step(setup: Setup, batch: Batch) -> Any:
    parts: Any = backprop.make_parts(setup)
    state = backprop.init(setup, parts, jax.random.key(0), batch, None, None)
    own = (state.params, state.model_state, state.opt_state, state.streams)
    return parts.last.lower(*own, batch.inputs, batch.targets).compile()


def _slowest(seconds: float) -> float:
    """The seconds of the slowest process; all must call this."""
    return max(group().exchange(seconds))


def _all_reduce_timer(
    found: Sequence[Sequence[jax.ShapeDtypeStruct]], placement: NamedSharding, repeats: int
) -> Callable[[float], float]:
    """A function that measures what these all-reduces add to other work of given seconds."""
    (work, _), (reduce, arrays) = (_reducer(found, placement, sums=sums) for sums in (False, True))

    def seconds(run: Callable, rounds: int) -> float:
        group().exchange(None)
        start = time.perf_counter()
        out = run(rounds, *arrays)
        jax.block_until_ready([shard.data for shard in out.addressable_shards])
        return time.perf_counter() - start

    def measure(part_seconds: float) -> float:
        # Not timed: the first call compiles.
        for run in (work, reduce):
            seconds(run, CALIBRATION)
        # The products before all of the all-reduces together take as long as a device's share of the step.
        rounds = math.ceil(part_seconds / (_slowest(seconds(work, CALIBRATION)) / CALIBRATION))
        turns = [(seconds(work, rounds), seconds(reduce, rounds), seconds(reduce, 0)) for _ in range(repeats)]
        alone, both, sums = (_slowest(statistics.median(column)) for column in zip(*turns, strict=True))
        return max(both - alone, sums)

    return measure


def _reducer(
    groups: Sequence[Sequence[jax.ShapeDtypeStruct]], placement: NamedSharding, *, sums: bool
) -> tuple[Callable[..., jax.Array], list[jax.Array]]:
    """A function with ``rounds`` of work before each all-reduce, and its arguments; only the work without ``sums``."""
    mesh, D = placement.mesh, placement.num_devices
    (axis,) = mesh.axis_names

    def work(rounds: jax.Array, before: jax.Array) -> jax.Array:
        # The next all-reduce adds this zero: XLA can neither start it before the work nor drop the work.
        started = jnp.eye(SIZE) + before
        return 0 * jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), started)[0, 0]

    def run(rounds: jax.Array, *arrays: jax.Array) -> jax.Array:
        left, before = list(arrays), jnp.zeros(())
        for summed in groups:
            before = work(rounds, before)
            mine = tuple(left.pop(0)[0] + before.astype(one.dtype) for one in summed)
            totals = jax.lax.psum(mine, axis) if sums else mine
            before = sum((total.ravel()[0].astype(before.dtype) for total in totals), 0 * before)
        return jnp.reshape(before, (1,))

    split = PartitionSpec(axis)
    zeros = [np.zeros((D, *one.shape), one.dtype) for summed in groups for one in summed]
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), *(split for _ in zeros)), out_specs=split)
    return jax.jit(mapped), [place(x, NamedSharding(mesh, split)) for x in zeros]
