"""What the prediction program predicts: each method's schedule, what times its parts, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import fr_jax as fr
from fr_jax.diagnostics.profiling.data_parallel_times import data_parallel_timer
from fr_jax.diagnostics.profiling.lockstep import lockstep
from fr_jax.diagnostics.profiling.stage_times import Measured, stage_timer
from fr_jax.diagnostics.profiling.watched_steps import STEPS
from fr_jax.diagnostics.simulation.schedules import data_parallel
from fr_jax.diagnostics.simulation.timeline import Task
from fr_jax.experiments._bench.contestants import (
    OPTIMIZER,
    make_batch,
    make_entry,
    method_settings,
    shared_costs,
    unsplit,
)
from fr_jax.experiments._bench.turns import Contestant
from fr_jax.experiments._cli.settings import SharedSettings, own_of_method
from fr_jax.experiments._methods import COMPARED, DATA_PARALLEL, LOCKSTEP, METHODS
from fr_jax.experiments._models import example_inputs, random_batch
from fr_jax.experiments._run.cuts import choose_cuts
from fr_jax.training.classification import cross_entropy
from fr_jax.types import Array, Stage

__all__ = ["CHOICES", "ONE", "Prediction", "choose", "own_of", "prepare", "title_of"]

ONE = "one device"
CHOICES = tuple(name for name in COMPARED if name in (*STEPS, DATA_PARALLEL))
"""Methods whose parts can be timed."""


class Prediction(NamedTuple):
    """A method: its schedule, the name of the timer of its parts, and what runs it."""

    schedule: Callable[[Measured, int], tuple[Task, ...]]
    timer: str
    contestant: Contestant


def title_of(name: str, shared: SharedSettings) -> str:
    """In a picture."""
    return f"{METHODS['bp'].title}, {ONE}" if name == ONE else COMPARED[name].titled(own_of(name, shared))


def own_of(name: str, shared: SharedSettings) -> dict[str, Any]:
    """The own settings of one of :data:`COMPARED`."""
    return own_of_method(shared, name) if name in METHODS else {}


def microbatches_of(name: str, shared: SharedSettings) -> int:
    """M of one of :data:`COMPARED`."""
    return own_of(name, shared).get("microbatches", 1)


def timer_of(name: str, shared: SharedSettings) -> str:
    """How the parts of a method are timed: alone, all devices at once, or in their places in the method's own step."""
    # stage_times.py says why: a function of a method with locking is slower in its step than alone.
    M = microbatches_of(name, shared)
    at_once = name in METHODS and METHODS[name].decoupled
    return f"at once, M = {M}" if at_once and M > 1 else "at once" if at_once else f"{COMPARED[name].title}'s step"


def choose(shared: SharedSettings, layers: Sequence[Stage], K: int) -> tuple[int, ...]:
    """The cuts for features replay, by measured times."""
    own = method_settings(shared, "fr", K, None)
    example = example_inputs(shared.model, shared.batch_size or 128)
    return choose_cuts(own, layers, example, shared_costs(own, layers, example))


def prepare(
    shared: SharedSettings, layers: Sequence[Stage], methods: Sequence[str], K: int, cuts: tuple[int, ...]
) -> tuple[dict[str, Prediction], dict[str, Callable[[], Measured]]]:
    """The methods, back-propagation on one device first, and the timers of their parts."""
    timers = _timers(shared, layers, methods, K, cuts)
    bp = make_entry(unsplit(shared), layers, "bp", 1).contestant
    found = {ONE: Prediction(_schedule_of("bp", K, 1), ONE, bp)}
    for name in methods:
        if name == LOCKSTEP:
            contestant = _lockstep(shared, layers, K, cuts)
        else:
            places = () if name == DATA_PARALLEL else cuts
            contestant = make_entry(shared, layers, name, K, cuts=places).contestant
        found[name] = Prediction(
            _schedule_of(name, K, microbatches_of(name, shared)), timer_of(name, shared), contestant
        )
    return found, timers


def _schedule_of(name: str, K: int, M: int) -> Callable[[Measured, int], tuple[Task, ...]]:
    schedule = COMPARED[name].schedule
    if schedule is not None:
        return lambda measured, steps: schedule(measured.times, steps, M)
    return lambda measured, steps: data_parallel(
        measured.times.stages[0].last, K, steps, all_reduce=measured.times.all_reduce
    )


def _timers(
    shared: SharedSettings, layers: Sequence[Stage], methods: Sequence[str], K: int, cuts: tuple[int, ...]
) -> dict[str, Callable[[], Measured]]:
    batch, spread = random_batch(shared.model, shared.batch_size or 128), fr.placement(K)
    whole, stages = fr.partition(layers, ()), fr.partition(layers, cuts)
    timers = {ONE: stage_timer(["bp"], whole, cross_entropy, OPTIMIZER, batch, placement=fr.placement(1))}
    # Methods whose functions are timed in the same way share a timer, which times equal functions once.
    sharing: dict[str, list[str]] = {}
    for name in methods:
        sharing.setdefault(timer_of(name, shared), []).append(name)
    for timer, names in sharing.items():
        if DATA_PARALLEL in names:
            (split,) = fr.placement(1, data_parallel=K)
            timers[timer] = data_parallel_timer(whole[0], cross_entropy, OPTIMIZER, batch, placement=split)
            continue
        options: dict[str, Any] = {"placement": spread, "microbatches": microbatches_of(names[0], shared)}
        if timer.startswith("at once"):
            options |= {"synthesizers": fr.models.synthesizer(), "synthesizer_optimizer": optax.adam(1e-3)}
        else:
            options["in_step"] = True
        timers[timer] = stage_timer(names, stages, cross_entropy, OPTIMIZER, batch, **options)
    return timers


def _lockstep(shared: SharedSettings, layers: Sequence[Stage], K: int, cuts: tuple[int, ...]) -> Contestant:
    placement = fr.placement(K)
    method = lockstep(fr.partition(layers, cuts), cross_entropy, OPTIMIZER, placement=placement)
    batch = make_batch(shared.model, shared.batch_size or 128, placement[0])

    def run(state: Any) -> tuple[Any, Array]:
        state, info = method.step(state, batch)
        return state, info.loss

    return Contestant(COMPARED[LOCKSTEP].title, run, method.init(jax.random.key(0), batch))
