"""The step loop: issues step t, reads the metrics of a few steps ago, evaluates and saves at intervals.

It knows an ``Algorithm`` and nothing of any method.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fr_jax import distributed
from fr_jax.data.pipelines import InputPipeline
from fr_jax.training.checkpoints import Checkpoints
from fr_jax.training.classification import evaluate
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.metrics_reader import Divergence, MetricsReader, Reporter, Schedule, Stopwatch
from fr_jax.types import Algorithm

__all__ = ["Divergence", "Outcome", "Schedule", "Totals", "train"]

PROFILED_STEPS = 10


class Totals(NamedTuple):
    """What a run carries across a resume beside the training state."""

    seconds: float = 0.0
    test_accuracy: float | None = None
    best_test_accuracy: float | None = None


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      state: the training state at the end.
      step: steps done.
      totals: seconds and accuracies, earlier parts of a resumed run included.
      step_seconds_median: median time of a step in this part of the run, or None if too few were timed.
      divergence: where the run stopped being finite, or None.
      finished: whether all steps were done.
    """

    state: Any
    step: int
    totals: Totals
    step_seconds_median: float | None
    divergence: Divergence | None
    finished: bool


def train(
    algorithm: Algorithm,
    state: Any,
    pipeline: InputPipeline,
    schedule: Schedule,
    *,
    report: Reporter,
    checkpoints: Checkpoints,
    metadata: Callable[[Totals], dict[str, Any]],
    totals: Totals,
    stop: StopRequest,
) -> Outcome:
    """Trains from ``state.step`` to ``schedule.steps``, or until asked to stop, or until a number is not finite.

    Args:
      algorithm: the method.
      state: fresh from ``algorithm.init``, or restored.
      pipeline: the data.
      schedule: intervals, in steps.
      report: told of every read step, row, test score and checkpoint.
      checkpoints: where states are saved; only finite ones are.
      metadata: makes what is saved beside a state.
      totals: of the earlier parts of this run.
      stop: checked after every step; in a run of several processes, every ``log_every`` steps.

    Returns:
      The outcome. After a divergence nothing is saved.

    Raises:
      CheckpointError: a checkpoint could not be written; the earlier ones are intact.
    """
    watch = Stopwatch(totals.seconds)
    reader = MetricsReader(schedule, len(state.params), report, watch, distributed.group())
    profiler = _Profiler(schedule, state.step)
    step = saved = state.step
    with profiler:
        while step < schedule.steps and not reader.should_stop(stop):
            profiler.at(step)
            state, info = algorithm.step(state, pipeline.train_batch(step))
            step += 1
            reader.add(step, info, stop)
            last = step == schedule.steps
            evaluating = last or step % schedule.eval_every == 0
            saving = last or step % schedule.checkpoint_every == 0
            if evaluating or saving:
                reader.drain(stop)
            if evaluating and reader.divergence is None:
                with watch.paused():
                    score = evaluate(algorithm.predict, state, pipeline.test_batches())
                best = max(score.accuracy, totals.best_test_accuracy or 0.0)
                totals = Totals(watch.seconds(), score.accuracy, best)
                report.test(step, score, totals.seconds)
            if saving and reader.sound(step, state):
                totals = totals._replace(seconds=watch.seconds())
                checkpoints.save(step, state, metadata(totals))
                report.saved(step)
                saved = step
                reader.restart_row()
    reader.drain(stop)
    totals = totals._replace(seconds=watch.seconds())
    if saved < step and reader.sound(step, state):
        checkpoints.save(step, state, metadata(totals))
        report.saved(step)
    median = statistics.median(reader.step_seconds) if len(reader.step_seconds) >= 3 else None
    finished = step == schedule.steps and reader.divergence is None
    return Outcome(state, step, totals, median, reader.divergence, finished)


class _Profiler:
    """Traces ten steps with ``jax.profiler``, once everything is compiled."""

    def __init__(self, schedule: Schedule, first: int) -> None:
        self._folder = schedule.profile
        left = schedule.steps - first
        self._start = first + max(min(2 * schedule.ahead, left - PROFILED_STEPS), 0)
        self._tracing = False

    def __enter__(self) -> _Profiler:
        return self

    def at(self, step: int) -> None:
        if self._folder is not None and step == self._start:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif self._tracing and step == self._start + PROFILED_STEPS:
            self.__exit__()

    def __exit__(self, *unused: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
