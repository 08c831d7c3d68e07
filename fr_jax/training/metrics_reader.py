"""What the loop learns of the steps it has issued: their metrics, read late, and agreed on by all processes."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, SequenceKey

from fr_jax._arrays import is_readable, read
from fr_jax.distributed import Group
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.task import Task
from fr_jax.types import Info

__all__ = ["LASTING", "Divergence", "Intervals", "MetricsReader", "Reporter", "Stopwatch"]

LASTING = 10
"""Steps in a row with a number that is not finite after which a run that drops such updates has diverged."""


class Intervals(NamedTuple):
    """What happens when, in steps (mini-batches).

    Attributes:
      steps: the whole run.
      log_every: steps averaged in a training row.
      eval_every: steps between evaluations; the last step is always evaluated.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      ahead: how many steps may be issued beyond the newest one whose metrics have been read. It must exceed the
        number of stages, or a pipeline of decoupled stages runs dry.
    """

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    ahead: int


class Divergence(NamedTuple):
    """Where a number first stopped being finite: the step, the stage (1..K), and which number it was."""

    step: int
    stage: int
    what: str


class Reporter(Protocol):
    """Receives what a run reports.

    ``advanced(step)``: the metrics of a step were read. ``row(row)``: a row of ``metrics.jsonl`` is complete. A
    training row has ``step``, ``epoch``, ``train_loss``, the task's metrics as ``train_<name>``, ``<unit>_per_s``,
    ``seconds``, and the method's metrics of each stage under their own names (``gradient_norm/1``; ``skipped/1`` is the
    number of updates that the stage dropped, if any); a test row has ``step``, ``epoch``, ``test_loss``,
    ``test_<name>`` and ``seconds``. Both have ``dataset``.
    """

    def advanced(self, step: int) -> None: ...
    def row(self, row: dict[str, Any]) -> None: ...


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
    """Reads metrics ``ahead`` steps late, so that the host waits for a device only to bound the steps in flight.

    In a run of several processes each reads the numbers of its own stages; every ``log_every`` steps they tell each
    other, so that all of them see the same divergence and stop after the same step.

    A method with metrics ``skipped/k`` drops updates that are not finite. It has diverged if they come :data:`LASTING`
    times in a row, or at the end of the run more than once.

    Attributes:
      step_seconds: between one read and the next.
      divergence: where a number first was not finite, if anywhere.
      stopped: whether a process was asked to stop.
    """

    def __init__(
        self,
        task: Task,
        intervals: Intervals,
        K: int,
        watch: Stopwatch,
        stop: StopRequest,
        report: Reporter | None,
        group: Group,
    ) -> None:
        self._task, self._intervals, self._K, self._watch = task, intervals, K, watch
        self._stop, self._report, self._group = stop, report, group
        self._pending: deque[tuple[int, Info]] = deque()
        self._untold: list[tuple[int, dict[str, float]]] = []
        self._row: list[dict[str, float]] = []
        self._row_start = watch.seconds()
        self._last_read: float | None = None
        self._read_at: deque[float] = deque()  # of the steps that are not agreed on yet, by the stopwatch
        self.step_seconds: list[float] = []
        self.divergence: Divergence | None = None
        self.stopped = False
        self._skipping = False
        self._since: dict[tuple[int, str], Divergence] = {}  # the numbers that are not finite now

    def should_stop(self) -> bool:
        """Whether the run ends here; the same in all processes."""
        return self.divergence is not None or self.stopped or (self._group.size == 1 and self._stop.signal is not None)

    def add(self, step: int, info: Info) -> None:
        """Takes the metrics of a step that was issued, and reads those of an earlier one."""
        self._pending.append((step, info))
        if len(self._pending) > self._intervals.ahead:
            self._read()
        if self._group.size == 1 or step % self._intervals.log_every == 0:
            self._agree()

    def drain(self) -> None:
        """Waits for every step that was issued. The next interval between two reads is not a step's time."""
        while self._pending:
            self._read()
        self._agree()
        self._write_row()
        self._last_read = None

    def restart_row(self) -> None:
        """The time since the last row was not training; it does not count in the next row's rate."""
        self._row_start = self._watch.seconds()

    def sound(self, step: int, state: Any, *, last: bool) -> bool:
        """Whether nothing has diverged, every number of ``state`` included: a finite loss may have made bad weights.

        Where updates are dropped, what is in flight may be anything; but while the newest numbers are not finite, a
        state is not sound unless it is the ``last``.
        """
        if self.divergence is None:
            found = self._group.exchange(_not_finite(step, state, in_flight=not self._skipping))
            self.divergence = next((Divergence(*one) for one in found if one is not None), None)
        return self.divergence is None and (last or not self._since)

    def write(self, step: int, numbers: Mapping[str, float], seconds: float) -> None:
        """Reports a row."""
        if self._report is not None:
            epoch = round(step / self._task.pipeline.steps_per_epoch, 6)
            whole = {"step": step, "epoch": epoch, **numbers, "seconds": seconds, "dataset": self._task.dataset}
            self._report.row(whole)

    def _read(self) -> None:
        step, info = self._pending.popleft()
        scalars = {name: x for name, x in {"loss": info.loss, **info.metrics}.items() if not getattr(x, "ndim", 0)}
        # A metric of a stage in another process is not readable here; that process tells it.
        here = {name: x for name, x in scalars.items() if not isinstance(x, jax.Array) or is_readable(x)}
        self._untold.append(
            (step, {name: float(read(x) if isinstance(x, jax.Array) else x) for name, x in here.items()})
        )
        self._group.sign()
        now = time.perf_counter()
        if self._last_read is not None:
            self.step_seconds.append(now - self._last_read)
        self._last_read = now
        self._read_at.append(self._watch.seconds())
        if self._report is not None:
            self._report.advanced(step)

    def _agree(self) -> None:
        """Brings together what the processes have read; each has read the same steps."""
        told: list[Any] = self._group.exchange([self._untold, self._stop.signal])
        self._untold = []
        for parts in zip(*(steps for steps, _ in told), strict=True):
            self._take(parts[0][0], {name: number for _, numbers in parts for name, number in numbers.items()})
        signals = [signal for _, signal in told if signal is not None]
        if signals:
            self._stop.signal, self.stopped = signals[0], True

    def _take(self, step: int, numbers: dict[str, float]) -> None:
        self._seconds = self._read_at.popleft()
        self._check_finite(step, numbers)
        self._row.append(numbers)
        self._step = step
        if step % self._intervals.log_every == 0:
            self._write_row()

    def _write_row(self) -> None:
        """Each number's mean over the row's steps that have it."""
        if not self._row:
            return
        names = dict.fromkeys(name for numbers in self._row for name in numbers)
        columns = {name: [one[name] for one in self._row if name in one] for name in names}
        means = {name: self._mean(values) for name, values in columns.items() if not _is_count(name)}
        means |= {name: sum(values) for name, values in columns.items() if _is_count(name) and any(values)}
        of_task = {f"train_{name}": mean for name, mean in means.items() if not _of_a_stage(name)}
        of_stages = {name: mean for name, mean in means.items() if _of_a_stage(name)}
        # Steps that were read one right after another may have the same time.
        rate = len(self._row) * self._task.units_per_step / max(self._seconds - self._row_start, 1e-9)
        self.write(self._step, {**of_task, f"{self._task.unit}_per_s": rate, **of_stages}, self._seconds)
        self._row, self._row_start = [], self._seconds

    def _mean(self, values: list[float]) -> float:
        """Of those that are finite, if updates that are not are dropped, and the newest is."""
        finite = list(filter(math.isfinite, values))
        whole = len(finite) == len(values) or (self._skipping and math.isfinite(values[-1]))
        return statistics.fmean(finite) if whole else math.nan

    def _check_finite(self, step: int, numbers: dict[str, float]) -> None:
        self._skipping = self._skipping or any(map(_is_count, numbers))
        lasting = 1 if not self._skipping else 2 if step == self._intervals.steps else LASTING
        norms = ((k, "gradient norm", numbers.get(f"gradient_norm/{k}", 0.0)) for k in range(1, self._K + 1))
        # The loss comes first: it is the last stage's, and all gradients follow from it.
        for k, name, value in ((self._K, "loss", numbers["loss"]), *norms):
            if math.isfinite(value):
                self._since.pop((k, name), None)
                continue
            first = self._since.setdefault((k, name), Divergence(step, k, f"{name} = {value}"))
            if self.divergence is None and step - first.step + 1 >= lasting:
                self.divergence = first


def _is_count(name: str) -> bool:
    """Whether a metric counts something: it is added up over the steps of a row, and left out where it is 0."""
    return name.startswith("skipped/")


def _of_a_stage(name: str) -> bool:
    """Whether a metric is a method's, of stage k: ``gradient_norm/k``. All others are the task's."""
    return name.rpartition("/")[2].isdecimal() and "/" in name


def _not_finite(step: int, state: Any, *, in_flight: bool = True) -> Divergence | None:
    """The first leaf here that holds a number that is not finite; tuples of a state have one entry per stage.

    A stage's own state and an optimizer's may hold infinities: a mask, the best loss so far. Without ``in_flight`` only
    what every method has is looked at.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        field = path[0].name if isinstance(path[0], GetAttrKey) else ""
        if not in_flight and field not in ("params", "model_state", "opt_state"):
            continue
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            for shard in leaf.addressable_shards:
                values = np.asarray(shard.data)
                may_be_infinite = field in ("model_state", "opt_state")
                bad = values[np.isnan(values) if may_be_infinite else ~np.isfinite(values)]
                if bad.size:
                    stage = path[1].idx + 1 if len(path) > 1 and isinstance(path[1], SequenceKey) else len(state.params)
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    return Divergence(step, stage, f"{name} = {bad.flat[0]}")
    return None
