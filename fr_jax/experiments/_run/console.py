"""What a run shows while it goes: the table of stages, the progress bar, and its rows on disk."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from tqdm import tqdm

from fr_jax.experiments._cli.harness import discard_output
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._run.session import Session, stage_work
from fr_jax.training.classification import Score
from fr_jax.training.metrics_log import MetricsLog

__all__ = ["Console", "Silent", "announce", "device_name", "stage_table", "unread"]


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """A reader that goes away ends what is printed, not the training."""
    try:
        yield
    except BrokenPipeError:
        discard_output()
        with contextlib.suppress(OSError):
            print("fr_jax: nobody reads the output any more; training goes on.", file=sys.stderr, flush=True)


def stage_table(session: Session, state: Any) -> str:
    """One line a stage: layers, parameters, work, share of all work, device."""
    bounds = (0, *session.cuts, len(session.layers))
    work = stage_work(session)
    lines = [f"{'stage':>5}  {'layers':<9} {'parameters':>11}  {'GFLOP/step':>10}  {'share':>6}  device"]
    for k, flops in enumerate(work):
        layers = f"{bounds[k]}-{bounds[k + 1] - 1}" if bounds[k + 1] - bounds[k] > 1 else str(bounds[k])
        size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params[k]))
        where = device_name(session.placement[k])
        share = flops / sum(work)
        lines.append(f"{k + 1:>5}  {layers:<9} {size:>11,}  {flops / 1e9:>10.2f}  {share:>6.1%}  {where}")
    return "\n".join(lines)


def device_name(sharding: Sharding) -> str:
    """``cpu:0``, or ``cpu:0,1`` for a mesh."""
    devices = list(sharding.mesh.devices.flat) if isinstance(sharding, NamedSharding) else list(sharding.device_set)
    return f"{devices[0].platform}:{','.join(str(device.id) for device in devices)}"


def announce(session: Session, state: Any) -> str:
    """The lines before training starts."""
    s, data = session.settings, session.dataset
    steps, per_epoch = s.steps, session.pipeline.steps_per_epoch
    share = max(stage_work(session)) / sum(stage_work(session))
    return "\n".join(
        [
            f"{s.model}, {METHODS[s.method].title}, K = {s.K}; batch {s.batch_size}, "
            f"learning rate {s.learning_rate:g}, {steps:,} steps ({steps / per_epoch:.4g} epochs of {per_epoch})",
            f"data: {data.source}",
            f"folder: {s.workdir}",
            "",
            stage_table(session, state),
            f"The slowest stage does {share:.1%} of the work; {1 / s.K:.1%} would be perfect balance.",
            "",
        ]
    )


class Console:
    """Tells the user and the files of a run what happens; the ``Reporter`` of :func:`fr_jax.training.loop.train`."""

    def __init__(self, session: Session, log: MetricsLog, first_step: int) -> None:
        self._session, self._log = session, log
        self._per_epoch = session.pipeline.steps_per_epoch
        self._screen = sys.stdout or io.StringIO()  # a daemon may have none
        seldom = 0.5 if self._screen.isatty() else 10.0  # seconds; a log file is not a screen
        self._bar = tqdm(
            total=session.settings.steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            file=self._screen,
            mininterval=seldom,
            postfix="compiling",
        )

    def close(self) -> None:
        """Ends the bar."""
        with unread():
            self._bar.close()

    def say(self, text: str) -> None:
        """A line above the bar."""
        with unread():
            self._bar.write(text, file=self._screen)

    def advanced(self, step: int) -> None:
        """A step's metrics were read."""
        with unread():
            self._bar.update(step - self._bar.n)

    def training(self, step: int, loss: float, accuracy: float, images_per_s: float, seconds: float) -> None:
        """A training row is complete."""
        text = f"loss {loss:.3f}, accuracy {accuracy:.1%}, {images_per_s:.0f} images/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._write(step, train_loss=loss, train_accuracy=accuracy, images_per_s=images_per_s, seconds=seconds)

    def test(self, step: int, score: Score, seconds: float) -> None:
        """The network was evaluated."""
        epoch = step / self._per_epoch
        self.say(
            f"epoch {epoch:6.2f}  test loss {score.loss:.4f}  test accuracy {score.accuracy:.2%}  ({seconds:.0f} s)"
        )
        self._write(step, test_loss=score.loss, test_accuracy=score.accuracy, seconds=seconds)

    def saved(self, step: int) -> None:
        """A checkpoint is complete."""

    def _write(self, step: int, **values: float) -> None:
        epoch = round(step / self._per_epoch, 6)
        self._log.write({"step": step, "epoch": epoch, **values, "dataset": self._session.dataset.name})


class Silent:
    """The ``Reporter`` of the processes that do not report."""

    def training(self, step: int, loss: float, accuracy: float, images_per_s: float, seconds: float) -> None:
        """A training row is complete."""

    def test(self, step: int, score: Score, seconds: float) -> None:
        """The network was evaluated."""

    def advanced(self, step: int) -> None:
        """A step's metrics were read."""

    def saved(self, step: int) -> None:
        """A checkpoint is complete."""
