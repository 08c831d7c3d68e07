"""Runs of the same recipe as one line, and how many more updates it needs than back-propagation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fr_jax.experiments._fields import SettingsError, flag
from fr_jax.experiments._methods import METHODS
from fr_jax.training.run_folder import RunFolder
from fr_jax.training.task import Headline

__all__ = ["Line", "Recipe", "Run", "extra_updates", "extra_updates_of", "lines_of", "read_runs", "reference_of"]

SHARED = ("model", "dataset", "batch_size", "schedule", "test_examples", "depth", "width", "heads", "context", "dtype")
"""Settings that all runs of a comparison must have in common."""


class Recipe(NamedTuple):
    """What seeds and learning rates of a line have in common; ``own``: the method's settings that are no defaults."""

    method: str
    K: int
    M: int
    optimizer: str
    own: tuple[tuple[str, Any], ...]

    @property
    def remedies(self) -> str:
        """The own settings as flags, or empty."""
        return " ".join(f"{flag(name)} {value}" for name, value in self.own)

    @property
    def label(self) -> str:
        """For people."""
        where = "" if self.K == 1 else f", K = {self.K}"
        remedies = f", {self.remedies}" if self.remedies else ""
        return METHODS[self.method].titled({"microbatches": self.M}, where) + remedies


class Run(NamedTuple):
    """A finished run: its recipe, learning rate, seed, updates, and final held-out number (lower is better)."""

    recipe: Recipe
    learning_rate: float
    seed: int
    steps: int
    score: float
    config: Mapping[str, Any]


class Line(NamedTuple):
    """The runs of a recipe with the same number of updates and its best learning rate, one per seed.

    Attributes:
      recipe, steps, learning_rate: of all.
      scores: by seed; infinite where a run diverged.
      rates: ``{learning rate: mean score}`` of all rates that were tried with this number of updates.
    """

    recipe: Recipe
    steps: int
    learning_rate: float
    scores: tuple[float, ...]
    rates: Mapping[float, float]

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.scores)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """All finished runs in the folders, and in folders in them.

    Raises:
      SettingsError: a folder holds no finished run, or the runs are not of the same problem.
      WorkdirError: a file of a run cannot be read.
    """
    runs: list[Run] = []
    for folder in folders:
        found = [run for path in sorted(folder.rglob("summary.json")) if (run := _read(path.parent)) is not None]
        if not found:
            raise SettingsError(
                f"--runs {folder} holds no finished run: a run's folder has config.json and summary.json. Give folders "
                "of runs, or folders of such folders."
            )
        runs += found
    first = runs[0].config if runs else {}
    for run in runs:
        for name in SHARED:
            if run.config.get(name) != first.get(name):
                raise SettingsError(
                    f"--runs: {flag(name)} is {first.get(name)} in {first['workdir']} and {run.config.get(name)} in "
                    f"{run.config['workdir']}. Compare runs of one problem."
                )
    return runs


def _read(path: Path) -> Run | None:
    folder = RunFolder(path)
    config, summary = folder.saved_config(), folder.saved_summary()
    if config is None or summary is None or config.get("method") not in METHODS:
        return None
    headline = Headline.of(config)
    score = summary.get(f"test_{headline.name}")
    lost = summary["diverged"] or score is None or not math.isfinite(score)
    own = METHODS[config["method"]].defaults
    changed = [
        (name, config[name])
        for name, default in own.items()
        if name not in ("microbatches", "pipeline_schedule") and config.get(name) not in (None, False, default)
    ]
    recipe = Recipe(
        config["method"],
        config["K"],
        config.get("microbatches") or own.get("microbatches", 1),
        config["optimizer"],
        tuple(changed),
    )
    score = math.inf if lost else headline.compared(score)
    return Run(recipe, config["learning_rate"], config["seed"], config["steps"], score, config | {"workdir": path})


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """A line for each recipe and number of updates, at the learning rate with the lowest mean over its seeds.

    A rate that was tried with one seed stands beside one with three, and the rates of the same seeds are compared.
    """
    groups: dict[tuple[Recipe, int], dict[float, dict[int, float]]] = {}
    for run in runs:
        rates = groups.setdefault((run.recipe, run.steps), {})
        rates.setdefault(run.learning_rate, {})[run.seed] = run.score
    lines = []
    for (recipe, steps), rates in groups.items():
        common = set.intersection(*(set(seeds) for seeds in rates.values()))
        means = {
            rate: statistics.fmean(score for seed, score in seeds.items() if seed in common or not common)
            for rate, seeds in sorted(rates.items())
        }
        best = min(means, key=lambda rate: means[rate])
        scores = tuple(score for _, score in sorted(rates[best].items()))
        lines.append(Line(recipe, steps, best, scores, means))
    return lines


def reference_of(lines: Sequence[Line], optimizer: str) -> dict[int, float]:
    """``{updates: score}`` of back-propagation with the optimizer on one device, the yardstick of the others."""
    return {
        line.steps: line.score
        for line in lines
        if line.recipe.method == "bp" and line.recipe.optimizer == optimizer and not line.recipe.own
    }


def extra_updates(steps: int, score: float, reference: Mapping[int, float]) -> float | None:
    """What share of updates more a method needs to a score: ``steps`` over the reference's own number, minus 1.

    The reference's number of updates for the score is interpolated linearly in its logarithm between the reference's
    runs, each of which ends at its own schedule's end; beyond them it goes on along the last two.

    Args:
      steps: updates of the method's run.
      score: at its end; lower is better.
      reference: ``{updates: score}`` of back-propagation, two or more.

    Returns:
      Such as 0.05: 5 % more updates; None without two reference runs that differ, or for a run that diverged.

    Example:
      >>> reference = {1000: 2.4, 2000: 2.2}
      >>> round(extra_updates(2000, 2.2, reference), 3), round(extra_updates(2000, 2.3, reference), 3)
      (0.0, 0.414)
    """
    if not math.isfinite(score) or len(reference) < 2:
        return None
    x = np.log(sorted(reference))
    y = np.array([reference[n] for n in sorted(reference)])
    if (np.diff(y) >= 0).any():
        return None
    i = int(np.clip(np.searchsorted(-y, -score) - 1, 0, len(y) - 2))
    slope = (x[i + 1] - x[i]) / (y[i + 1] - y[i])
    return float(steps / math.exp(x[i] + slope * (score - y[i])) - 1)


def extra_updates_of(line: Line, reference: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Of the line's mean score, and the standard deviation over its seeds; None where there is none."""
    each = [extra_updates(line.steps, score, reference) for score in line.scores]
    known = [one for one in each if one is not None]
    return extra_updates(line.steps, line.score, reference), statistics.stdev(known) if len(known) > 1 else None
