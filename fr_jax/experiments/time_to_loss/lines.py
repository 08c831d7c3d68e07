"""Runs of the same recipe as one line, and how many more updates it needs than back-propagation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fr_jax.experiments._fields import SettingsError, flag
from fr_jax.experiments._methods import METHODS
from fr_jax.training.run_folder import RunFolder
from fr_jax.training.task import Headline

__all__ = [
    "Line",
    "Recipe",
    "Run",
    "extra_updates",
    "extra_updates_of",
    "is_beyond",
    "lines_of",
    "read_runs",
    "reference_of",
]

SHARED = (
    *("model", "dataset", "data_source", "data_checksum", "batch_size", "schedule", "test_examples", "dtype"),
    *("depth", "width", "heads", "context", "positions", "dropout_rate"),
)
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
      scores: ``{seed: score}``; infinite where a run diverged.
      rates: ``{learning rate: mean score}`` of all rates that were tried with this number of updates.
    """

    recipe: Recipe
    steps: int
    learning_rate: float
    scores: Mapping[int, float]
    rates: Mapping[float, float]

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.scores.values())


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
            this, other = run.config.get(name), first.get(name)
            if this != other:
                places = f"{other} in {first['workdir']} and {this} in {run.config['workdir']}"
                raise SettingsError(f"--runs: {flag(name)} is {places}. Compare runs of one problem.")
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
        if name not in ("microbatches", "pipeline_schedule")
        and config.get(name) not in (None, default)
        and config[name] is not False
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

    Raises:
      SettingsError: two runs differ in nothing that makes them a line, a rate or a seed of their own.
    """
    groups: dict[tuple[Recipe, int], dict[float, dict[int, float]]] = {}
    folders: dict[tuple, Any] = {}
    for run in runs:
        rates = groups.setdefault((run.recipe, run.steps), {})
        rates.setdefault(run.learning_rate, {})[run.seed] = run.score
        key, folder = (run.recipe, run.steps, run.learning_rate, run.seed), run.config.get("workdir")
        if key in folders:
            raise SettingsError(
                f"--runs: {folders[key]} and {folder} are both {run.recipe.label} with {run.recipe.optimizer}, "
                f"{run.steps} updates, learning rate {run.learning_rate:g} and seed {run.seed}. Give one of them."
            )
        folders[key] = folder
    lines = []
    for (recipe, steps), rates in groups.items():
        common = set.intersection(*(set(seeds) for seeds in rates.values()))
        means = {
            rate: statistics.fmean(score for seed, score in seeds.items() if seed in common or not common)
            for rate, seeds in sorted(rates.items())
        }
        best = min(means, key=lambda rate: means[rate])
        lines.append(Line(recipe, steps, best, dict(sorted(rates[best].items())), means))
    return lines


def reference_of(lines: Sequence[Line], optimizer: str) -> dict[int, float]:
    """``{updates: score}`` of back-propagation with the optimizer on one device, the yardstick of the others.

    Of lines with different numbers of micro-batches, which batch normalization tells apart, the best one counts.
    """
    found: dict[int, float] = {}
    for line in lines:
        if (line.recipe.method, line.recipe.K, line.recipe.optimizer, line.recipe.own) == ("bp", 1, optimizer, ()):
            found[line.steps] = min(line.score, found.get(line.steps, math.inf))
    return found


def extra_updates(steps: int, score: float, reference: Mapping[int, float]) -> float | None:
    """What share of updates more a method needs to a score: ``steps`` over the reference's own number, minus 1.

    The reference's number of updates for the score is interpolated linearly in its logarithm between the reference's
    runs, each of which ends at its own schedule's end; beyond them it goes on along the nearest two. A run of the
    reference that is no better than a shorter one does not count.

    Args:
      steps: updates of the method's run.
      score: at its end; lower is better.
      reference: ``{updates: score}`` of back-propagation.

    Returns:
      Such as 0.05: 5 % more updates; None if fewer than two runs of the reference count, or for a run that diverged.

    Example:
      >>> reference = {1000: 2.4, 2000: 2.2}
      >>> round(extra_updates(2000, 2.2, reference), 3), round(extra_updates(2000, 2.3, reference), 3)
      (0.0, 0.414)
    """
    better: list[tuple[int, float]] = []
    for n, reached in sorted(reference.items()):
        if reached < min((y for _, y in better), default=math.inf):
            better.append((n, reached))
    if not math.isfinite(score) or len(better) < 2:
        return None
    segments = list(pairwise(better))
    (n, y), (more, lower) = next((one for one in segments if score >= one[1][1]), segments[-1])
    return steps / (n * (more / n) ** ((score - y) / (lower - y))) - 1


def extra_updates_of(line: Line, reference: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Of the line's mean score, and the standard deviation over its seeds; None where there is none."""
    each = [extra_updates(line.steps, score, reference) for score in line.scores.values()]
    known = [one for one in each if one is not None]
    return extra_updates(line.steps, line.score, reference), statistics.stdev(known) if len(known) > 1 else None


def is_beyond(line: Line, reference: Mapping[int, float]) -> bool:
    """Whether the line's mean score lies outside those of the reference, so that its extra updates are extrapolated."""
    known = [score for score in reference.values() if math.isfinite(score)]
    return bool(known) and not min(known) <= line.score <= max(known)
