"""The step loop: issues step t, reads the metrics of a few steps ago, evaluates and saves at intervals.

It knows an ``Algorithm`` and nothing of any method.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import SequenceKey

from fr_jax.training.augment import InputPipeline
from fr_jax.training.checkpoint import Checkpoints
from fr_jax.training.classification import Score, evaluate
from fr_jax.training.interrupt import StopRequest
from fr_jax.types import Algorithm, Info

__all__ = ["Divergence", "Outcome", "Schedule", "Totals", "train"]

PROFILED_STEPS = 10


class Schedule(NamedTuple):
    """What happens when, in steps (mini-batches).

    Attributes:
      steps: the whole run.
      batch_size: examples a step.
      log_every: steps averaged in a training row.
      eval_every: steps between evaluations; the last step is always evaluated.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      ahead: how many steps may be issued beyond the newest one whose metrics have been read. It must exceed the
        number of stages, or a pipeline of decoupled stages runs dry.
      profile: where to write a ``jax.profiler`` trace of ten steps, if anywhere.
    """

    steps: int
    batch_size: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    ahead: int
    profile: Path | None = None


class Totals(NamedTuple):
    """What a run carries across a resume beside the training state."""

    seconds: float = 0.0
    test_accuracy: float | None = None
    best_test_accuracy: float | None = None


class Divergence(NamedTuple):
    """Where a number first stopped being finite: the step, the stage (1..K), and which number it was."""

    step: int
    stage: int
    what: str


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


class Reporter(Protocol):
    """Who is told what happens."""

    def training(self, step: int, loss: float, accuracy: float, images_per_s: float, seconds: float) -> None: ...
    def test(self, step: int, score: Score, seconds: float) -> None: ...
    def advanced(self, step: int) -> None: ...
    def saved(self, step: int) -> None: ...


class Stopwatch:
    """Seconds of training: it stands still while paused."""

    def __init__(self, before: float) -> None:
        self._before, self._start = before, time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


class MetricsReader:
    """Reads metrics ``ahead`` steps late, so that the host waits for a device only to bound the steps in flight."""

    def __init__(self, schedule: Schedule, K: int, report: Reporter, watch: Stopwatch) -> None:
        self._schedule, self._K, self._report, self._watch = schedule, K, report, watch
        self._pending: deque[tuple[int, Info]] = deque()
        self._row: list[tuple[float, float]] = []
        self._row_start = watch.seconds()
        self._last_read: float | None = None
        self.step_seconds: list[float] = []
        self.divergence: Divergence | None = None

    def add(self, step: int, info: Info) -> None:
        self._pending.append((step, info))
        if len(self._pending) > self._schedule.ahead:
            self._read()

    def drain(self) -> None:
        """Waits for every step that was issued. The next interval between two reads is not a step's time."""
        while self._pending:
            self._read()
        self._write_row()
        self._last_read = None

    def restart_row(self) -> None:
        """What came since the last row was not training; it does not count in the next row's images per second."""
        self._row_start = self._watch.seconds()

    def sound(self, step: int, state: Any) -> bool:
        """Whether nothing has diverged, every number of ``state`` included: a finite loss may have made bad weights."""
        if self.divergence is None:
            self.divergence = _not_finite(step, state)
        return self.divergence is None

    def _read(self) -> None:
        step, info = self._pending.popleft()
        loss, metrics = float(info.loss), {name: float(value) for name, value in info.metrics.items()}
        self._check_finite(step, loss, metrics)
        now = time.perf_counter()
        if self._last_read is not None:
            self.step_seconds.append(now - self._last_read)
        self._last_read = now
        self._row.append((loss, metrics.get("accuracy", math.nan)))
        self._report.advanced(step)
        self._step = step
        if step % self._schedule.log_every == 0:
            self._write_row()

    def _write_row(self) -> None:
        if not self._row:
            return
        seconds = self._watch.seconds()
        rate = len(self._row) * self._schedule.batch_size / max(seconds - self._row_start, 1e-9)
        loss, accuracy = (statistics.fmean(column) for column in zip(*self._row, strict=True))
        self._report.training(self._step, loss, accuracy, rate, seconds)
        self._row, self._row_start = [], seconds

    def _check_finite(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        if self.divergence is not None:
            return
        if not math.isfinite(loss):
            self.divergence = Divergence(step, self._K, f"loss = {loss}")
            return
        for k in range(1, self._K + 1):
            norm = metrics.get(f"gradient_norm/{k}", 0.0)
            if not math.isfinite(norm):
                self.divergence = Divergence(step, k, f"gradient norm = {norm}")
                return


def _not_finite(step: int, state: Any) -> Divergence | None:
    """The first leaf of ``state`` that holds a number that is not finite; tuples of a state are one entry a stage."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            values = np.asarray(leaf)
            bad = values[~np.isfinite(values)]
            if bad.size:
                stage = path[1].idx + 1 if len(path) > 1 and isinstance(path[1], SequenceKey) else len(state.params)
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return Divergence(step, stage, f"{name} = {bad.flat[0]}")
    return None


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
      stop: checked after every step.

    Returns:
      The outcome. After a divergence nothing is saved.

    Raises:
      CheckpointError: a checkpoint could not be written; the earlier ones are intact.
    """
    watch = Stopwatch(totals.seconds)
    reader = MetricsReader(schedule, len(state.params), report, watch)
    profiler = _Profiler(schedule, state.step)
    step = saved = state.step
    with profiler:
        while step < schedule.steps and stop.signal is None and reader.divergence is None:
            profiler.at(step)
            state, info = algorithm.step(state, pipeline.train_batch(step))
            step += 1
            reader.add(step, info)
            last = step == schedule.steps
            evaluating = last or step % schedule.eval_every == 0
            saving = last or step % schedule.checkpoint_every == 0
            if evaluating or saving:
                reader.drain()
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
    reader.drain()
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
