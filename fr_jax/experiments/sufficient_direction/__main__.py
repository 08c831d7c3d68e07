"""Measures Assumption 1 while a network trains: ``python -m fr_jax.experiments.sufficient_direction --every 100``.

Figure 3 of Huo, Gu, Huang 2018: σ_k = <∇f_k(w^t), g_k^t> / ||∇f_k(w^t)||² of every stage, with the gradient over many
mini-batches. Training goes on as in ``fr_jax.experiments.cifar``, bit for bit: a measurement reads the state and takes
a step that is thrown away. Beside the method stands what one mini-batch alone does to the direction: its own gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

import fr_jax as fr
from fr_jax.diagnostics.sufficient_direction import (
    Direction,
    SampledGradient,
    directions,
    sampled_gradient,
    whole,
)
from fr_jax.experiments._cli import command_line, harness
from fr_jax.experiments._cli.command_line import Program
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.settings import TrainSettings
from fr_jax.experiments._fields import SettingsError, check_fields, setting
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._run import program
from fr_jax.experiments._run.session import Session, make_algorithm
from fr_jax.experiments.sufficient_direction.picture import plot_directions, standing_out
from fr_jax.training.metrics_log import MetricsLog, read_rows
from fr_jax.training.run_folder import RunFolder
from fr_jax.types import Batch, Info, PyTree

__all__ = ["SufficientDirectionSettings", "main", "run"]

SAMPLED_EPOCH = 2**32 - 1
"""No run gets there, so that no mini-batch whose direction is measured is among those of the gradient."""


@dataclasses.dataclass(frozen=True)
class SufficientDirectionSettings(TrainSettings):
    """Train as fr_jax.experiments.cifar does, and measure how far each stage's direction is from the gradient.

    The run's folder also holds sufficient_direction.jsonl (sigma, cosine and norm ratio of each stage and of the whole
    network, and the same for one mini-batch's own gradient) and sufficient_direction.png.
    """

    FOLDER_PREFIX: ClassVar[str] = "sufficient-direction-"

    every: int | None = setting(None, least=1, free="resume")
    """Steps between measurements. Default: 1/20 of the run."""
    gradient_batches: int = setting(32, least=0, free="resume")
    """Mini-batches over which the gradient is taken, the same in every measurement, shuffled and augmented as in an
    epoch that is never trained on; 0, or more than it has: the whole epoch. From a part of one, the square of the
    gradient's norm is estimated without the noise of the sample; where it is not above twice its standard error,
    nothing is drawn."""


class Measurement(NamedTuple):
    """One, whose numbers may still be on their devices."""

    step: int
    method: tuple[Direction, ...]
    one_batch: tuple[Direction, ...]


class Watcher:
    """The measurements of a session, made between the steps of its method: a ``Hook`` of the training loop.

    A row is written when the next measurement begins, so that no step waits for one.
    """

    def __init__(self, settings: SufficientDirectionSettings, session: Session, log: MetricsLog) -> None:
        s = session.settings
        self._session, self._log, self._steps = session, log, s.steps
        self._every = settings.every or max(1, s.steps // 20)
        self._count = _gradient_batches(settings, session)
        stages = fr.partition(session.layers, session.cuts)
        self._inspected = make_algorithm(s, stages, session.placement, session.task, return_grads=True)
        example = session.task.pipeline.train_batch(0)
        self._gradient = sampled_gradient(stages, session.task.loss, example, placement=session.placement)
        self._pending: Measurement | None = None

    def __call__(self, state: Any, info: Info | None) -> None:
        """Measures, if it is due, at the state from which the next step starts."""
        if state.step % self._every == 0 and state.step < self._steps:
            self.write()
            self._pending = self._measure(state, self._session.task.pipeline.train_batch(state.step))

    def _measure(self, state: Any, batch: Batch) -> Measurement:
        # Only its directions are kept. It donates nothing, so that training goes on from the same state.
        one_step = self._inspected.step(state, batch)[1].grads
        assert one_step is not None
        pipeline = self._session.task.pipeline
        first = SAMPLED_EPOCH * pipeline.steps_per_epoch
        sample = self._gradient(state, (pipeline.train_batch(first + number) for number in range(self._count)))
        is_whole = self._count == pipeline.steps_per_epoch
        # Over a whole epoch the gradient is exact, and there is no noise of a sample to take out.
        gradients: Sequence[PyTree] | SampledGradient = sample.mean if is_whole else sample
        own = self._gradient(state, [batch]).mean
        return Measurement(state.step, directions(gradients, one_step), directions(gradients, own))

    def write(self) -> None:
        """The row of the last measurement, once."""
        if self._pending is None:
            return
        at, self._pending = self._pending, None
        epoch = round(at.step / self._session.task.pipeline.steps_per_epoch, 6)
        row = {"step": at.step, "epoch": epoch, **_numbers(at.method)}
        self._log.write(row | {"one_batch": _numbers(at.one_batch)})


def _gradient_batches(settings: SufficientDirectionSettings, session: Session) -> int:
    """Over how many mini-batches the gradient is: an epoch's at most."""
    epoch = session.task.pipeline.steps_per_epoch
    return min(settings.gradient_batches or epoch, epoch)


def _numbers(stages: Sequence[Direction]) -> dict[str, Any]:
    read = [one.read() for one in stages]
    network = whole(read)
    names = ("sigma", "cosine", "norm_ratio", "gradient_norm", "gradient_square", "square_noise")
    own = {name: [getattr(one, name) for one in read] for name in names}
    return own | {"network": {name: getattr(network, name) for name in names}}


@contextlib.contextmanager
def measuring(
    settings: SufficientDirectionSettings, session: Session, folder: RunFolder, first_step: int
) -> Iterator[Watcher]:
    """The hook of a run; at its end, however it comes, the numbers are on disk and drawn."""
    resume_step = first_step - 1 if session.settings.resume else None  # that of the first step is made again
    with MetricsLog(folder.directions, resume_step=resume_step) as log:
        watcher = Watcher(settings, session, log)
        try:
            yield watcher
        finally:
            watcher.write()
            rows = read_rows(folder.directions)
            if rows:
                _draw(settings, session, folder, rows)
                print(f"{summary(rows)}\nPicture: {folder.directions_picture}   numbers: {folder.directions}")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """σ over the measurements in which a stage moved and its gradient stood out of the sample's noise, as text.

    Example:
      >>> print(summary([{"sigma": [0.0, 1.0]}, {"sigma": [-0.5, 1.0]}, {"sigma": [0.5, 0.9]}]))
      sigma in 3 measurements: median (least, share above 0)
        stage 1  0.000 (-0.500,  50 %) in 2
        stage 2  1.000 (0.900, 100 %) in 3
    """
    lines = [f"sigma in {len(rows)} measurements: median (least, share above 0)"]
    for k, values in enumerate(standing_out(rows, "sigma").T, start=1):
        values = values[np.isfinite(values) & (values != 0)]  # 0: the stage does not move yet
        if not len(values):
            lines.append(f"  stage {k}  never moved, or never stood out of the noise: give more --gradient-batches")
            continue
        share = 100 * np.mean(values > 0)
        lines.append(f"  stage {k}  {np.median(values):.3f} ({values.min():.3f}, {share:3.0f} %) in {len(values)}")
    return "\n".join(lines)


def _draw(
    settings: SufficientDirectionSettings, session: Session, folder: RunFolder, rows: Sequence[Mapping[str, Any]]
) -> None:
    s = session.settings
    title = f"{METHODS[s.method].title}, K = {s.K}, {s.model} on {s.dataset}: each stage's direction and the gradient"
    over = f"{_gradient_batches(settings, session)} mini-batches of {s.batch_size}"
    note = f"Gradient over {over}. Data: {session.task.source}"
    plot_directions(rows, folder.directions_picture, title=title, note=note, milestones=s.milestones)


def check(settings: SufficientDirectionSettings) -> None:
    """Checks what this program has of its own.

    Raises:
      SettingsError: for the first setting that cannot be used.
    """
    check_fields(settings)
    if settings.method in METHODS and METHODS[settings.method].whole:
        raise SettingsError(
            f"--method {settings.method} has no stages whose directions back-propagation's gradient could be compared "
            "with. Use another method."
        )
    one_process(
        "sufficient_direction adds up what all stages have, and runs in one process.",
        "Start it without fr_jax.launch, --coordinator and --distributed; its stages spread over the devices of this "
        "process.",
        asked=settings.coordinator is not None or settings.distributed,
    )


SUFFICIENT_DIRECTION = Program("sufficient_direction", dataset="cifar10", defaults=SufficientDirectionSettings())


def run(settings: SufficientDirectionSettings) -> int:
    """Trains and measures as ``settings`` say, and returns the exit code.

    Raises:
      ValueError, CheckpointError, OSError: as :func:`fr_jax.experiments._run.program.run` does.
    """
    check(settings)
    return program.run(SUFFICIENT_DIRECTION, settings, hook=functools.partial(measuring, settings))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 3 diverged, 130 or 143 stopped."""
    defaults = SufficientDirectionSettings()
    return harness.main("sufficient_direction", defaults, run, arguments, read=command_line.parse)


if __name__ == "__main__":
    sys.exit(main())
