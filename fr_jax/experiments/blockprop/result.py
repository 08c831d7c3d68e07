"""What the runs of a BlockProp figure came to: curves over the seeds, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fr_jax.data.image_sets import Dataset
from fr_jax.experiments._cli.machine import machine, settings_of
from fr_jax.experiments._cli.tables import markdown_table, mean_and_deviation
from fr_jax.experiments.blockprop.plan import Line
from fr_jax.experiments.blockprop.settings import BlockPropSettings
from fr_jax.plotting.comparison import mean_over_runs
from fr_jax.training.metrics_log import read_rows
from fr_jax.training.run_folder import RunFolder

__all__ = ["summarise", "table"]

POINTS = 80
QUANTITIES = ("gluing_loss", "train_loss", "test_accuracy", "test_loss")
DRAWN = {2: ("test_accuracy",), 3: QUANTITIES}
"""Figure -> what it draws."""


def summarise(settings: BlockPropSettings, lines: Sequence[Line], home: Path, dataset: Dataset) -> dict[str, Any]:
    """The lines whose runs are over, with their ends and their curves; JSON can hold it.

    Returns:
      Settings, machine, date, data, and ``lines``: panel, label, ``factor`` (:attr:`Line.factor`), by seed
      ``test_accuracy`` and ``best_test_accuracy`` (percent) and ``diverged``, the ``gluing_loss`` and ``train_loss`` at
      the end (smoothed, means over the seeds), and ``curves``: ``step``, ``epoch``, ``mean``, ``low``, ``high`` of what
      the figure draws of these and of test accuracy (percent) and test loss.
    """
    rows = (_row(line, settings.seeds or (), home, DRAWN[settings.figure]) for line in lines)
    return {
        "figure": settings.figure,
        "settings": settings_of(settings, "workdir", "data_dir"),
        "data": dataset.source,
        "test_examples": settings.test_examples,
        **machine(),
        "lines": [row for row in rows if row is not None],
    }


def _row(line: Line, seeds: Sequence[int], home: Path, drawn: Sequence[str]) -> dict[str, Any] | None:
    folders = {seed: RunFolder(home / line.run_name(seed)) for seed in seeds}
    over = {seed: summary for seed, folder in folders.items() if (summary := folder.saved_summary()) is not None}
    if not over:
        return None
    rows = [_renamed(read_rows(folders[seed].metrics)) for seed in over]
    curves = {name: curve for name in QUANTITIES if (curve := _curve(rows, name))["step"]}
    of_runs = lambda name: [summary[name] for summary in over.values()]
    return {
        "panel": line.panel,
        "label": line.label,
        "method": line.method,
        **(line.own or dict.fromkeys(("penalty", "h_steps", "h_learning_rate"))),
        "block_learning_rates": list(line.rates),
        "factor": line.factor,
        "cuts": of_runs("cuts")[0],
        "seeds": list(over),
        **{name: of_runs(name) for name in ("steps", "diverged", "seconds")},
        **{name: [_percent(one) for one in of_runs(name)] for name in ("test_accuracy", "best_test_accuracy")},
        **{name: curves[name]["mean"][-1] if name in curves else None for name in QUANTITIES[:2]},
        "curves": {name: curve for name, curve in curves.items() if name in drawn},
    }


def _renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the metric of the one cut by its name; in runs of fr_jax 0.1 it has that already."""
    return [{name.removesuffix("/1"): value for name, value in row.items()} for row in rows]


def _percent(accuracy: float | None) -> float | None:
    return None if accuracy is None else round(100 * accuracy, 4)


def _curve(rows: Sequence[list[dict[str, Any]]], name: str) -> dict[str, list[float]]:
    by_step, _ = mean_over_runs(rows, name, "step")
    by_epoch, _ = mean_over_runs(rows, name, "epoch")
    mean, low, high = by_step.y, by_step.low, by_step.high
    if name == "test_accuracy":  # there it is an error
        mean, low, high = 100 - mean, 100 - high, 100 - low
    kept = np.unique(np.linspace(0, len(mean) - 1, min(POINTS, len(mean))).round().astype(int))
    parts = {"step": by_step.x, "epoch": by_epoch.x, "mean": mean, "low": low, "high": high}
    return {part: [float(f"{value:.6g}") for value in values[kept]] for part, values in parts.items()}


def table(result: Mapping[str, Any]) -> str:
    """The lines as a Markdown table: test accuracy after the last step, mean ± standard deviation over the seeds."""
    head = ("line", "λ₁", "N_h", "γ_B1", "γ_B2", "factor", "test accuracy %", "gluing loss", "training loss")
    body = []
    for line in result["lines"]:
        known = lambda name, form, line=line: "-" if line[name] is None else f"{line[name]:{form}}"
        lost = sum(line["diverged"])
        accuracy = mean_and_deviation(line["test_accuracy"], line["diverged"], 2)
        body.append(
            (
                "BlockProp" if line["method"] == "blockprop" else "back-propagation",
                *(known(name, "g") for name in ("penalty", "h_steps")),
                *(f"{rate:g}" for rate in line["block_learning_rates"]),
                known("factor", ".4g"),
                accuracy + (f" ({lost} of {len(line['diverged'])} diverged)" if lost else ""),
                *(known(name, ".3g") for name in ("gluing_loss", "train_loss")),
            )
        )
    note = (
        f"{result['data']}; {result['test_examples']:,} test images. factor: what block 1's step is of "
        "back-propagation's, to first order in γ_h. BlockProp's training loss is taken at its gluing variable."
    )
    return f"{markdown_table(head, dict.fromkeys(body))}\n\n{note}"  # a run may be a line of two panels
