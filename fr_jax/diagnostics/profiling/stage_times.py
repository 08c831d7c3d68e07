"""Measures what schedules are made from: each module's own jitted functions on its device, and the transfers.

In a run of several processes each times the modules on its own devices, all at once or in turns; then
they tell each other.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import optax
from jax.sharding import Sharding

from fr_jax._arrays import place, put
from fr_jax.algorithms import dni
from fr_jax.algorithms._validation import Optimizers, check_count, check_setup
from fr_jax.diagnostics.profiling.stage_calls import Call, Synthesizers, calls_of, run_once
from fr_jax.diagnostics.simulation.times import StageTimes, Times
from fr_jax.distributed import group
from fr_jax.types import Batch, LossFn, PyTree, Stage

__all__ = ["KINDS_OF", "Measured", "crossings", "exchanged", "is_mine", "median", "stage_timer"]

KINDS_OF = {
    "bp": ("forward", "backward", "update", "last"),
    "fr": ("play", "replay", "last"),
    "ddg": ("forward", "backward", "update", "last"),
    "dni": ("forward", "synthesize", "backward", "update", "last", "learn"),
    "gpipe": ("forward", "gradient", "backward", "accumulate", "update"),
}
"""What the schedule of each method needs to know."""
OF_SYNTHESIZERS = {"synthesize", "learn"}


class Measured(NamedTuple):
    """One measurement.

    Attributes:
      times: seconds; NaN for kinds that were not asked for.
      transfer_share: the part of a transfer's time, 0 to 1, for which a sender or receiver on a CPU is busy with it
        (:func:`fr_jax.diagnostics.simulation.timeline.occupying`); 0 for other devices, and without transfers.
    """

    times: Times
    transfer_share: float


def stage_timer(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    batch: Batch,
    *,
    kinds: Iterable[str],
    placement: Sequence[Sharding] | None = None,
    synthesizers: Stage | Sequence[Stage] | None = None,
    synthesizer_optimizer: optax.GradientTransformation | None = None,
    repeats: int = 3,
    hops: int = 10,
    together: bool = True,
    keep_weights: bool = True,
) -> Callable[[], Measured]:
    """Prepares a measurement: makes the modules, and what their functions are called with.

    Functions are those of ``algorithms/_functions.py`` with donated buffers, as programs train. Each is timed from the
    call to the result. A transfer is timed as a ping-pong of the feature between the devices of two modules. The first
    measurement compiles, and warms up.

    Args:
      stages: the K modules.
      loss_fn: ``(outputs, targets) -> scalar``.
      optimizer: one optax transformation, or K.
      batch: the mini-batch; for GPipe's times a microbatch.
      kinds: fields of :class:`fr_jax.diagnostics.simulation.times.StageTimes` (:data:`KINDS_OF`).
      placement: one sharding a module; None puts all on the default device.
      synthesizers: for ``"synthesize"`` and ``"learn"``: one stage for all K-1, or a sequence.
      synthesizer_optimizer: theirs.
      repeats: timed calls of each function in a measurement, of which the median counts.
      hops: there-and-back journeys of a feature in a measurement.
      together: in a run of several processes, whether all work at the same time, as they do in a method without
        locking, and slow each other down by what they share (memory); otherwise they take turns, as in
        back-propagation.
      keep_weights: whether VJPs hold copies of the weights, as those of DDG and DNI; those of back-propagation and
        GPipe do not.

    Returns:
      A function that measures. In a run of several processes all must call it.

    Raises:
      ValueError: an unknown kind, synthesizers that are missing, a wrong number of stages, optimizers or shardings, or
        ``repeats`` or ``hops`` less than 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 8)))
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8, num_classes=8), (1,))
      >>> measure = stage_timer(
      ...     stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1), batch, kinds=KINDS_OF["fr"], repeats=1
      ... )
      >>> times, share = measure()
      >>> times.stages[0].replay > 0 and times.stages[1].last > 0, times.features, share
      (True, (0.0,), 0.0)
    """
    setup, wanted = check_setup(stages, optimizer, placement), _check_kinds(kinds)
    check_count("repeats", repeats)
    check_count("hops", hops)
    own = None
    if wanted & OF_SYNTHESIZERS:
        if synthesizers is None or synthesizer_optimizer is None:
            raise ValueError("'synthesize' and 'learn' need synthesizers and synthesizer_optimizer; pass both.")
        checked = dni.check_synthesizers(synthesizers, synthesizer_optimizer, False, len(setup.stages))
        own = Synthesizers(checked.stages, checked.optimizer)
    batch = Batch(place(batch.inputs, setup.shardings[0]), place(batch.targets, setup.shardings[-1]))
    modules = run_once(setup, loss_fn, batch, keep_weights=keep_weights)
    calls = [
        calls_of(k, setup, module, loss_fn, batch.targets, own, wanted, keep_weights=keep_weights)
        if is_mine(setup.shardings[k])
        else {}
        for k, module in enumerate(modules)
    ]
    features = [module.h_out for module in modules[:-1]]
    return lambda: _measure(calls, features, setup.shardings, repeats, hops, together)


def _check_kinds(kinds: Iterable[str]) -> set[str]:
    wanted = set(kinds)
    if not wanted <= {*StageTimes._fields}:
        raise ValueError(
            f"kinds {sorted(wanted - {*StageTimes._fields})} are unknown; they can be {', '.join(StageTimes._fields)}."
        )
    return wanted


def is_mine(sharding: Sharding | None) -> bool:
    """Whether all devices of a module are of this process."""
    return sharding is None or sharding.is_fully_addressable


def _measure(
    calls: Sequence[dict[str, Call]],
    features: Sequence[PyTree],
    shardings: Sequence[Sharding | None],
    repeats: int,
    hops: int,
    together: bool,
) -> Measured:
    jobs = [(k, kind, call) for k, own in enumerate(calls) for kind, call in own.items()]
    for *_, call in jobs:
        call.seconds()
    rounds: list[list[float]] = []
    for index in [group().index] if together else range(group().size):
        group().exchange(None)
        if index == group().index:
            rounds = [[call.seconds() for *_, call in jobs] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    mine = [(k, kind, seconds) for (k, kind, _), seconds in zip(jobs, medians, strict=True)]
    return exchanged(len(calls), mine, crossings(features, shardings, hops))


def exchanged(K: int, mine: Sequence[tuple[int, str, float]], crossing: Sequence[tuple[float, float]]) -> Measured:
    """What all processes have measured: each gives ``(k, kind, seconds)`` of its modules; all must call it."""
    table: list[dict[str, float]] = [{} for _ in range(K)]
    for k, kind, seconds in (row for rows in group().exchange([*mine]) for row in rows):
        table[k][kind] = seconds
    seconds = tuple(one for one, _ in crossing)
    shares = [share for one, share in crossing if one > 0]
    times = Times(tuple(StageTimes(**own) for own in table), seconds, seconds)
    return Measured(times, statistics.fmean(shares) if shares else 0.0)


def crossings(features: Sequence[PyTree], shardings: Sequence[Sharding | None], hops: int) -> list[tuple[float, float]]:
    """For each cut the seconds of one way, and the share of them for which the processors at its ends are busy."""
    return [_ping_pong(h, shardings[k], shardings[k + 1], hops) for k, h in enumerate(features)]


def _ping_pong(h: PyTree, here: Sharding | None, there: Sharding | None, hops: int) -> tuple[float, float]:
    """Seconds of one way, and the share of them for which each end's processor is busy."""
    if here is None or there is None or here == there:
        return 0.0, 0.0
    put(put(h, there), here)
    group().exchange(None)
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(hops):
        h = put(put(h, there), here)
    if is_mine(here):
        jax.block_until_ready(h)
    seconds = time.perf_counter() - start if is_mine(here) else math.nan
    group().exchange(None)
    takes_part = is_mine(here) + is_mine(there)
    on_cpu = all(device.platform == "cpu" for device in here.device_set | there.device_set)
    busy = time.process_time() - busy if on_cpu and takes_part else 0.0
    found = group().exchange([seconds, busy])
    total = next(one for one, _ in found if not math.isnan(one))
    return total / (2 * hops), min(1.0, sum(busy for _, busy in found) / 2 / total)


def median(measured: Sequence[Measured]) -> Measured:
    """The median of several measurements, number by number.

    Raises:
      ValueError: there are none.

    Example:
      >>> one, two = (Measured(Times((StageTimes(last=s),), (), ()), 0.0) for s in (1.0, 2.0))
      >>> median([one, two, two]).times.stages[0].last
      2.0
    """
    if not measured:
        raise ValueError("the median of no measurements was asked for; give at least one.")
    middle = lambda rows: tuple(statistics.median(column) for column in zip(*rows, strict=True))
    all_times = [one.times for one in measured]
    modules = zip(*(times.stages for times in all_times), strict=True)
    return Measured(
        Times(
            tuple(StageTimes(*middle(rows)) for rows in modules),
            middle([times.features for times in all_times]),
            middle([times.gradients for times in all_times]),
            statistics.median(times.all_reduce for times in all_times),
        ),
        statistics.median(one.transfer_share for one in measured),
    )
