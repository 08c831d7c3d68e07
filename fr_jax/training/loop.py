"""The step loop: issues step t, reads the metrics of a few steps ago, evaluates and saves at intervals.

It knows an ``Algorithm`` and a ``Task``, and nothing of any method or data set.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fr_jax import distributed
from fr_jax.training.checkpoints import Checkpoints
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.metrics_reader import Divergence, Intervals, MetricsReader, Reporter, Stopwatch
from fr_jax.training.task import Headline, Task
from fr_jax.types import Algorithm, Info

__all__ = ["Divergence", "Hook", "Intervals", "Outcome", "Reporter", "Totals", "train"]


class Hook(Protocol):
    """Looks at a run while it trains; ``hooks=`` of :func:`train` takes any number.

    ``hook(state, info)`` is called once with the first state and ``info=None``, then after each step was issued, with
    the state and the ``Info`` of that step: ``state.step`` is the number of steps issued. Their arrays may not be
    computed yet: a hook must not wait for a device (no ``float``, ``print`` or ``np.asarray`` of them), and must not
    keep ``state``, whose buffers the next step may reuse. It may issue computations of its own, and read them in a
    later call. What a hook raises ends the run. In a run of several processes it sees what its process has.
    """

    def __call__(self, state: Any, info: Info | None, /) -> None: ...


class Totals(NamedTuple):
    """What a run carries across a resume in addition to the training state.

    Attributes:
      seconds: of training.
      scores: of the last evaluation, ``{"test_loss": ..., "test_<name>": ..., "best_test_<headline>": ...}``; empty
        before the first one.
      position: of data that are not a function of the step (``InputPipeline.position``).
    """

    seconds: float = 0.0
    scores: Mapping[str, float] = {}
    position: Any = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Totals:
        """The totals in the metadata of a checkpoint, those of fr_jax 0.1 included."""
        scores = {name: value for name, value in metadata["totals"].items() if value is not None}
        return cls(scores.pop("seconds"), scores, metadata.get("position"))

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint holds in addition to the state."""
        position = {} if self.position is None else {"position": self.position}
        return {"totals": {"seconds": self.seconds, **self.scores}} | position

    def evaluated(self, score: Mapping[str, float], headline: Headline, seconds: float) -> Totals:
        """The totals after an evaluation."""
        best = f"best_test_{headline.name}"
        scores = {f"test_{name}": value for name, value in score.items()}
        scores[best] = headline.better(score[headline.name], self.scores.get(best))
        return self._replace(seconds=seconds, scores=scores)


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      state: the training state at the end.
      step: steps done.
      totals: seconds and scores, earlier parts of a resumed run included.
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
    task: Task,
    state: Any,
    intervals: Intervals,
    *,
    checkpoints: Checkpoints,
    stop: StopRequest,
    report: Reporter | None = None,
    hooks: Sequence[Hook] = (),
    totals: Totals | None = None,
) -> Outcome:
    """Trains from ``state.step`` to ``intervals.steps``, or until asked to stop, or until a number is not finite.

    A method that drops updates that are not finite may go on after single ones (:class:`MetricsReader`).

    Args:
      algorithm: the method, made with ``task.loss`` and ``task.metrics``.
      task: the data, and how progress is measured.
      state: fresh from ``algorithm.init``, or restored.
      intervals: in steps.
      checkpoints: where states are saved, with the totals; only finite ones are.
      stop: checked after every step; in a run of several processes, every ``log_every`` steps.
      report: receives each row of ``metrics.jsonl``; None in processes that do not report.
      hooks: called after each issued step.
      totals: of the earlier parts of this run.

    Returns:
      The outcome. After a divergence nothing is saved.

    Raises:
      CheckpointError: a checkpoint could not be written; the earlier ones are intact.
    """
    totals = totals or Totals()
    watch = Stopwatch(totals.seconds)
    position, seek = task.pipeline.position or (lambda: None), task.pipeline.seek
    if totals.position is not None and seek is not None:
        seek(totals.position, state.step)
    reader = MetricsReader(task, intervals, len(state.params), watch, stop, report, distributed.group())
    step = saved = state.step
    for hook in hooks:
        hook(state, None)
    while step < intervals.steps and not reader.should_stop():
        state, info = algorithm.step(state, task.pipeline.train_batch(step))
        step += 1
        for hook in hooks:
            hook(state, info)
        reader.add(step, info)
        last = step == intervals.steps
        evaluating = last or step % intervals.eval_every == 0
        saving = last or step % intervals.checkpoint_every == 0
        if evaluating or saving:  # a state is neither evaluated nor saved before all its numbers are known
            reader.drain()
        if evaluating and reader.divergence is None:
            with watch.paused():
                score = task.evaluate(algorithm.predict, state)
            totals = totals.evaluated(score, task.headline, watch.seconds())
            reader.write(step, {f"test_{name}": value for name, value in score.items()}, totals.seconds)
        # After the evaluation: a run that is resumed from here does not repeat it.
        if saving and reader.sound(step, state, last=last):
            totals = totals._replace(seconds=watch.seconds(), position=position())
            checkpoints.save(step, state, totals.metadata())
            saved = step
            reader.restart_row()
    reader.drain()
    totals = totals._replace(seconds=watch.seconds(), position=position())
    if saved < step and reader.sound(step, state, last=True):  # asked to stop between two checkpoints
        checkpoints.save(step, state, totals.metadata())
    median = statistics.median(reader.step_seconds) if len(reader.step_seconds) >= 3 else None
    finished = step == intervals.steps and reader.divergence is None
    return Outcome(state, step, totals, median, reader.divergence, finished)
