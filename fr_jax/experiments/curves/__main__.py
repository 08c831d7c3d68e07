"""Draws the curves of several runs in one figure: ``python -m fr_jax.experiments.curves --runs runs/A runs/B``.

Loss against epoch and against time, and the headline number (test error) against epoch, from the folders that the
training programs wrote, however and wherever they were started: by ``fr_jax.launch``, on one core, on another machine.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fr_jax._files import write_atomically
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.results import check_picture
from fr_jax.experiments._fields import SettingsError, check_fields, setting
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments.curves import reached
from fr_jax.plotting.comparison import Line, looks, plot_comparison
from fr_jax.training.metrics_log import read_rows
from fr_jax.training.run_folder import RunFolder
from fr_jax.training.task import Headline

__all__ = ["CurvesSettings", "main", "run"]


@dataclasses.dataclass(frozen=True)
class CurvesSettings:
    """Draw runs that were made one by one in one figure."""

    runs: tuple[Path, ...] = ()
    """Folders of runs, finished or not. Those with the same label are seeds of one line."""
    labels: tuple[str, ...] = ()
    """One per run. Default: the method and K."""
    step_seconds: tuple[float, ...] = setting((), least=0)
    """One per run: draw it over steps times this, such as a step measured by fr_jax.experiments.speed on a quiet
    machine, instead of over its own seconds. 0: leave it out of the panel with the time."""
    title: str | None = None
    """Over the figure. Default: the network and the data set."""
    losses: tuple[float, ...] = ()
    """Also say how long each run takes until its training loss, smoothed as drawn, stays below these, over the time of
    the panel with the time, and write it beside the picture as a .csv file."""
    output: Path = Path("comparison.png")
    """The PNG file."""
    overwrite: bool = False
    """Replace the files where they exist."""


def run(settings: CurvesSettings) -> int:
    """Draws the figure, and returns the exit code.

    Raises:
      SettingsError: no runs, not as many labels as runs, or a file that exists.
      WorkdirError: the files of a run cannot be read.
      OSError: the figure cannot be written.
    """
    check_fields(settings)
    if not settings.runs:
        raise SettingsError("--runs is missing; give the folders of one or more runs.")
    for name, each in (("--labels", settings.labels), ("--step-seconds", settings.step_seconds)):
        if each and len(each) != len(settings.runs):
            raise SettingsError(
                f"{len(each)} {name} were given for {len(settings.runs)} --runs; give one per run, or none."
            )
    if any(not math.isfinite(loss) for loss in settings.losses):
        raise SettingsError(f"--losses {' '.join(map(str, settings.losses))}: give finite numbers.")
    also = [".csv"] if settings.losses else []
    check_picture(settings.output, also, overwrite=settings.overwrite)
    found = [_read(folder) for folder in settings.runs]
    lines: dict[str, list[tuple[str, Any]]] = {}
    methods: dict[str, str] = {}
    for i, (config, rows) in enumerate(found):
        label = settings.labels[i] if settings.labels else _label(config)
        if settings.step_seconds:  # a run of 0 seconds per step has no time, and is left out of that panel
            rows = [row | {"seconds": row["step"] * settings.step_seconds[i] or None} for row in rows]
        lines.setdefault(label, []).append((settings.runs[i].as_posix(), rows))
        methods.setdefault(label, config["method"])
    first, _ = found[0]
    title = settings.title or f"{first.get('model')} on {first.get('dataset')}"
    pictured = [
        Line(label, [rows for _, rows in runs], *look)
        for (label, runs), look in zip(lines.items(), looks([*methods.values()]), strict=True)
    ]
    # Runs on several machines may have found their data in several places.
    sources = dict.fromkeys(str(config.get("data_source")) for config, _ in found)
    own: dict[str, Any] = {"time": "steps times the seconds of a step"} if settings.step_seconds else {}
    plot_comparison(
        pictured, settings.output, title=title, data_source="; ".join(sources), headline=Headline.of(first), **own
    )
    print(f"Picture: {settings.output}")
    if settings.losses:
        table, losses_file = reached.table(lines, settings.losses), settings.output.with_suffix(".csv")
        write_atomically(losses_file, reached.as_csv(table))
        print(f"{reached.as_text(table)}\nTable: {losses_file}")
    return harness.FINISHED


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = RunFolder(path)
    config = folder.saved_config()
    if config is None or not {"method", "K"} <= set(config) or not folder.metrics.exists():
        raise SettingsError(
            f"--runs {path} holds no run: a run's folder has config.json and metrics.jsonl. Give such folders."
        )
    try:
        rows = read_rows(folder.metrics)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if not any("train_loss" in row for row in rows):
        raise SettingsError(f"--runs {path} has no rows yet. Leave it out, or wait for its first steps.")
    return config, rows


def _label(config: dict[str, Any]) -> str:
    method, K, D = config["method"], config["K"], config.get("data_parallel") or 1
    title = METHODS[method].title if method in METHODS else method
    return title + (f", K = {K}" if K > 1 else "") + (f", {D} devices share a batch" if D > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 where the figure cannot be written, 2 for runs that cannot be drawn."""
    return harness.main("curves", CurvesSettings(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
