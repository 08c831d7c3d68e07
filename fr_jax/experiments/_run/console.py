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
from fr_jax.experiments._cli.settings import titled
from fr_jax.experiments._run.session import Session, stage_work
from fr_jax.training.metrics_log import MetricsLog

__all__ = ["Console", "announce", "device_name", "show", "stage_table", "unread"]


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
    """One line per stage: layers, parameters, work, share of all work, device."""
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
    s, task = session.settings, session.task
    steps, per_epoch = s.steps, task.pipeline.steps_per_epoch
    share = max(stage_work(session)) / sum(stage_work(session))
    return "\n".join(
        [
            f"{s.model}, {titled(s)}; batch {s.batch_size}, "
            f"learning rate {s.learning_rate:g}, {steps:,} steps ({steps / per_epoch:.4g} epochs of {per_epoch})",
            f"data: {task.source}",
            f"folder: {s.workdir}",
            "",
            stage_table(session, state),
            f"The slowest stage does {share:.1%} of the work; {1 / s.K:.1%} would be perfect balance.",
            "",
        ]
    )


def show(sample: str) -> None:
    """Prints what a trained network has made."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    rule = "-" * 80
    print(f"A sample:\n{rule}\n{sample.encode(encoding, 'replace').decode(encoding)}\n{rule}")


class Console:
    """Shows a run on the screen and writes its rows; the ``Reporter`` of :func:`fr_jax.training.loop.train`."""

    def __init__(self, session: Session, log: MetricsLog, first_step: int) -> None:
        self._task, self._log = session.task, log
        self._skipped: dict[str, int] = {}  # updates that each stage has dropped
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

    def row(self, row: dict[str, Any]) -> None:
        """A row of ``metrics.jsonl`` is complete."""
        self._log.write(row)
        kind = "test" if "test_loss" in row else "train"
        numbers = {name.removeprefix(f"{kind}_"): x for name, x in row.items() if name.startswith(f"{kind}_")}
        if kind == "test":
            scores = "  ".join(f"test {self._text(name, value)}" for name, value in numbers.items())
            self.say(f"epoch {row['epoch']:6.2f}  {scores}  ({row['seconds']:.0f} s)")
        else:
            rate = row[f"{self._task.unit}_per_s"]
            shown = [self._text(name, value) for name, value in numbers.items()] + self._skips(row)
            # The bar draws itself at its interval; a refresh for each row would fill a log file.
            self._bar.set_postfix_str(", ".join([*shown, f"{rate:.0f} {self._task.unit}/s"]), refresh=False)

    def _skips(self, row: dict[str, Any]) -> list[str]:
        """How many mini-batches were dropped so far, if any; the first time, a line that says so."""
        new = {name: int(value) for name, value in row.items() if name.startswith("skipped/")}
        if new and not self._skipped:
            stages = ", ".join(sorted(name.removeprefix("skipped/") for name in new))
            self.say(
                f"step {row['step']:,}: a loss or gradient was not finite. Stage {stages} dropped the update; training "
                "goes on, and counts such mini-batches (skipped, here and in metrics.jsonl)."
            )
        for name, value in new.items():
            self._skipped[name] = self._skipped.get(name, 0) + value
        return [f"{max(self._skipped.values())} skipped"] if self._skipped else []

    def _text(self, name: str, value: float) -> str:
        headline = self._task.headline
        return f"{name.replace('_', ' ')} {headline.text(value) if name == headline.name else format(value, '.4f')}"
