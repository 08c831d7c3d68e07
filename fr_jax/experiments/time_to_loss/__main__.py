"""Who reaches back-propagation's loss first, from finished runs: ``python -m fr_jax.experiments.time_to_loss``.

    time to loss = (1 + extra updates) x seconds per update

The extra updates of a recipe come from its runs and those of back-propagation; each recipe counts at its own best
learning rate. The seconds come from its stages' functions, timed on this machine one by one, and the schedule of its
method on K devices, simulated for links of several speeds. Its memory is that of the device with most of it, from
compiled code. 1F1B with the same number of micro-batches, and data parallelism, are beside it. Keep the process on one
core: then no function uses two.

    taskset -c 0 python -m fr_jax.experiments.time_to_loss --runs runs/sweep --output results
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fr_jax.diagnostics.profiling.watched_steps import STEPS
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.devices import take_devices
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine, settings_of
from fr_jax.experiments._cli.results import check_folder, write_results
from fr_jax.experiments._fields import SettingsError, check_fields, setting
from fr_jax.experiments._methods import DATA_PARALLEL, METHODS
from fr_jax.experiments._models import MODEL_CARDS
from fr_jax.experiments.time_to_loss.lines import (
    Line,
    Recipe,
    extra_updates_of,
    is_beyond,
    lines_of,
    read_runs,
    reference_of,
)
from fr_jax.experiments.time_to_loss.picture import figure
from fr_jax.experiments.time_to_loss.steps import measure_parts, problem_of, ring_seconds, step_seconds
from fr_jax.experiments.time_to_loss.table import PIPELINE, beside_M, tables
from fr_jax.plotting.style import png
from fr_jax.training.task import Headline

__all__ = ["TimeToLossSettings", "main", "measure", "run"]

FILES = ("time-to-loss.json", "time-to-loss.md", "time-to-loss.png")
TIMED = tuple(name for name in METHODS if name in STEPS and name != "dni")  # dni has synthesizers, too
PROBLEM = ("model", "dataset", "data_source", "batch_size", "schedule", "depth", "width", "heads", "context")
"""Settings of the runs that the result names."""


@dataclasses.dataclass(frozen=True)
class TimeToLossSettings:
    """Compare finished runs by the updates and the time that they need to back-propagation's held-out loss."""

    runs: tuple[Path, ...] = ()
    """Folders of finished runs, or of such folders; those of back-propagation with two or more numbers of steps (each
    to the end of its schedule) among them."""
    ratios: tuple[float, ...] = setting((0.0, 0.003, 0.01, 0.03, 0.1, 0.3), least=0, series="increasing")
    """Speeds of the links: the seconds in which the features of a mini-batch cross a cut, over those of a step of
    back-propagation on one device."""
    at: float = setting(0.01, least=0)
    """The ratio of the table; one of --ratios."""
    memory: tuple[float, ...] = setting((0.5, 1.0, 2.0), above=0, series="increasing")
    """Limits of the memory of a device in the table of winners, over what 1F1B needs with the same K and M."""
    rounds: int = setting(5, least=1)
    """How many times the functions of each method are timed; medians count."""
    updates_only: bool = False
    """Only count updates, and time nothing."""
    output: Path | None = None
    """A folder for time-to-loss.json, .md and .png; without it only the tables are printed."""
    overwrite: bool = False
    """Replace these files where they exist."""


def measure(settings: TimeToLossSettings) -> dict[str, Any]:
    """Reads the runs, and times and compiles what they did.

    Returns:
      Settings and versions; ``"lines"``, one per recipe and number of updates: its best learning rate and all that were
      tried, ``seeds`` and their scores (None: diverged), ``extra_updates`` and their standard deviation, and whether
      they are extrapolated (``beyond``); and ``"steps"``, one per optimizer, method, K, M and remedies: ``cuts``,
      ``seconds`` by ratio, and bytes of the ``largest_device``.

    Raises:
      SettingsError: no method can be compared, or the steps of one cannot be timed.
    """
    runs = read_runs(settings.runs)
    lines = sorted(lines_of(runs), key=_place)
    config, rows, steps = runs[0].config, [_row(line, lines) for line in lines], []
    recipes = [line.recipe for line, row in zip(lines, rows, strict=True) if _is_compared(row)]
    if not recipes:
        raise SettingsError(
            "--runs has no method with K > 1 that can be compared with back-propagation: that needs finished runs of "
            "--method bp --K 1 with two or more numbers of --steps, the longer of them with the better result."
        )
    if not settings.updates_only:
        check_measurable(config, recipes)
        take_devices(max(recipe.K for recipe in recipes), each=True)
        steps = measured_steps(settings, config, recipes)
    return {
        "settings": settings_of(settings),
        **machine(),
        "problem": {name: config[name] for name in PROBLEM if config.get(name) is not None},
        "headline": Headline.of(config).label,
        "lines": rows,
        "steps": steps,
    }


def _place(line: Line) -> tuple:
    recipe = line.recipe
    return (recipe.optimizer, line.steps, recipe.K, recipe.M, recipe.method != "bp", recipe.method, recipe.remedies)


def _is_compared(row: Mapping[str, Any]) -> bool:
    return row["K"] > 1 and row["method"] not in ("bp", PIPELINE) and row["extra_updates"] is not None


def _columns(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in ("method", "K", "M", "optimizer", "remedies")}


def _row(line: Line, lines: Sequence[Line]) -> dict[str, Any]:
    reference = reference_of(lines, line.recipe.optimizer)
    extra, deviation = extra_updates_of(line, reference)
    finite = lambda x: x if math.isfinite(x) else None  # JSON has no infinity
    return {
        **_columns(line.recipe),
        "label": line.recipe.label,
        "steps": line.steps,
        "learning_rate": line.learning_rate,
        "learning_rates": {f"{rate:g}": finite(mean) for rate, mean in line.rates.items()},
        "seeds": list(line.scores),
        "scores": [finite(score) for score in line.scores.values()],
        "score": finite(line.score),
        "extra_updates": extra,
        "extra_updates_deviation": deviation,
        "beyond": is_beyond(line, reference),
    }


def check_measurable(config: Mapping[str, Any], recipes: Iterable[Recipe]) -> None:
    """Raises SettingsError if the steps of a run cannot be timed here; before anything is."""
    why = ""
    if config["model"] not in MODEL_CARDS and not config["dataset"].startswith("cifar"):
        why = f"a {config['model']} on {config['dataset']}: images of 32 x 32 x 3 are timed"
    for recipe in recipes:
        if recipe.method not in TIMED:
            why = f"{recipe.method}, and only {', '.join(TIMED)} are timed"
        for parts in (recipe.M, beside_M(recipe.K, recipe.M), recipe.K):
            if config["batch_size"] % parts:
                why = f"{recipe.label}: {config['batch_size']} examples make no {parts} equal parts"
    if why:
        raise SettingsError(f"--runs has {why}. Leave the run out, or give --updates-only.")


def measured_steps(settings: TimeToLossSettings, config: Any, recipes: Iterable[Recipe]) -> list[dict[str, Any]]:
    """Seconds and memory of a step of the recipes, all with K > 1, and of 1F1B and data parallelism beside them.

    What a remedy computes once per update and weight is not in the seconds; what it keeps is in the memory. The links
    are taken as equally slow: ``ratio`` of back-propagation's step for the features of any cut.
    """
    found = []
    for optimizer in dict.fromkeys(recipe.optimizer for recipe in recipes):
        problem = problem_of(config, optimizer)
        shapes = [one for one in recipes if one.optimizer == optimizer]
        pipelines = [Recipe(PIPELINE, one.K, beside_M(one.K, one.M), optimizer, ()) for one in shapes]
        splits = [Recipe(DATA_PARALLEL, one.K, 1, optimizer, ()) for one in shapes]
        alone = measure_parts(problem, "bp", 1, 1, {}, rounds=settings.rounds).times.stages[0].last
        asked = list(dict.fromkeys([*pipelines, *splits, *shapes]))
        for recipe in tqdm(asked, desc=optimizer, unit="method", file=sys.stdout, dynamic_ncols=True):
            method, K, M = recipe.method, recipe.K, recipe.M
            parts = measure_parts(problem, method, K, M, dict(recipe.own), rounds=settings.rounds)
            ring = ring_seconds(problem, K, alone) if method == DATA_PARALLEL else 0.0
            seconds = {
                f"{ratio:g}": step_seconds(parts, method, K, M, ratio * alone, ratio * ring)
                for ratio in settings.ratios
            }
            measured = {"cuts": list(parts.cuts), "seconds": seconds, "largest_device": parts.largest_device}
            found.append(_columns(recipe) | measured)
    return found


def run(settings: TimeToLossSettings) -> int:
    """Measures, prints the tables and writes the files; returns the exit code.

    Raises:
      SettingsError: no runs, runs of different problems, or a file that exists.
      WorkdirError: the files of a run cannot be read.
    """
    check_fields(settings)
    if not settings.runs:
        raise SettingsError("--runs is missing; give the folders of finished runs, or folders of such folders.")
    if settings.at not in settings.ratios and not settings.updates_only:
        raise SettingsError(
            f"--at {settings.at:g} is not one of --ratios {' '.join(map('{:g}'.format, settings.ratios))}."
        )
    one_process("time_to_loss measures in one process.")
    check_folder(settings.output, FILES, overwrite=settings.overwrite)
    result = measure(settings)
    text = tables(result)
    print(text, flush=True)
    if settings.output is not None:
        contents = (result, f"{text}\n".encode(), png(figure(result)))
        return write_results(settings.output, dict(zip(FILES, contents, strict=True)))
    return harness.FINISHED


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for runs that cannot be compared."""
    return harness.main("time_to_loss", TimeToLossSettings(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
