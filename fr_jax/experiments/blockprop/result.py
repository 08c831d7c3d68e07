"""What the runs of a BlockProp figure came to: curves over the seeds, a table."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fr_jax.data.image_sets import Dataset
from fr_jax.experiments.blockprop.runs import Run
from fr_jax.experiments.blockprop.settings import BlockPropSettings
from fr_jax.plotting.comparison import mean_over_runs
from fr_jax.training.metrics_log import read_rows
from fr_jax.training.run_folder import RunFolder

__all__ = ["Line", "summarise", "table"]

POINTS = 80
QUANTITIES = ("gluing_loss", "train_loss", "test_accuracy", "test_loss")
DRAWN = {2: ("test_accuracy",), 3: QUANTITIES}
"""Figure -> what it draws."""


class Line(NamedTuple):
    """A line of the figure.

    Attributes:
      panel: which panel it belongs to; ``baseline`` and ``frozen`` are in all.
      label: in the legend.
      runs: one a seed.
    """

    panel: str
    label: str
    runs: tuple[Run, ...]


def summarise(settings: BlockPropSettings, lines: Sequence[Line], home: Path, dataset: Dataset) -> dict[str, Any]:
    """The lines whose runs are over, with their ends and their curves; JSON can hold it.

    Returns:
      Settings, machine, date, data, and ``lines``: panel, label, ``factor`` (:attr:`Run.factor`), by seed
      ``test_accuracy`` and ``best_test_accuracy`` (percent) and ``diverged``, the ``gluing_loss`` and ``train_loss`` at
      the end (smoothed, means over the seeds), and ``curves``: ``step``, ``epoch``, ``mean``, ``low``, ``high`` of what
      the figure draws of these and of test accuracy (percent) and test loss.
    """
    found = []
    for line in lines:
        folders = [RunFolder(home / run.name) for run in line.runs]
        over = [(run, f, s) for run, f in zip(line.runs, folders, strict=True) if (s := f.saved_summary()) is not None]
        if over:
            rows = [read_rows(folder.metrics) for _, folder, _ in over]
            curves = {name: curve for name in QUANTITIES if (curve := _curve(rows, name))["step"]}
            described = _describe(line, [run for run, _, _ in over], [summary for *_, summary in over])
            ends = {name: curves[name]["mean"][-1] if name in curves else None for name in QUANTITIES[:2]}
            drawn = {name: curve for name, curve in curves.items() if name in DRAWN[settings.figure]}
            found.append({**described, **ends, "curves": drawn})
    plain = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("workdir", "data_dir", "overwrite")}
    return {
        "figure": settings.figure,
        "settings": json.loads(json.dumps(plain, default=str)),
        "data": dataset.source,
        "test_examples": len(dataset.test_labels),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "lines": found,
    }


def _describe(line: Line, runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    s = runs[0].settings
    own = {name: getattr(s, name) for name in ("penalty", "h_steps", "h_learning_rate")}
    return {
        "panel": line.panel,
        "label": line.label,
        "method": s.method,
        **own,
        "block_learning_rates": list(runs[0].rates),
        "factor": runs[0].factor,
        "cuts": summaries[0]["cuts"],
        "seeds": [run.settings.seed for run in runs],
        "steps": [summary["steps"] for summary in summaries],
        "diverged": [summary["diverged"] for summary in summaries],
        "test_accuracy": [_percent(summary["test_accuracy"]) for summary in summaries],
        "best_test_accuracy": [_percent(summary["best_test_accuracy"]) for summary in summaries],
        "seconds": [summary["seconds"] for summary in summaries],
    }


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
        own = ["-" if line[name] is None else f"{line[name]:g}" for name in ("penalty", "h_steps")]
        label = "BlockProp" if line["method"] == "blockprop" else "back-propagation"
        rates = [f"{rate:g}" for rate in line["block_learning_rates"]]
        losses = ["-" if line[name] is None else f"{line[name]:.3g}" for name in ("gluing_loss", "train_loss")]
        body.append((label, *own, *rates, f"{line['factor']:.4g}", _spread(line), *losses))
    body = list(dict.fromkeys(body))  # a run may be a line of two panels
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    join = lambda cells: "| " + " | ".join(c.ljust(width) for c, width in zip(cells, widths, strict=True)) + " |"
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    note = (
        f"{result['data']}; {result['test_examples']:,} test images. factor: what block 1's step is of "
        "back-propagation's, to first order in γ_h. BlockProp's training loss is taken at its gluing variable."
    )
    return "\n".join([join(head), rule, *map(join, body), "", note])


def _spread(line: Mapping[str, Any]) -> str:
    there = [a for a, off in zip(line["test_accuracy"], line["diverged"], strict=True) if a is not None and not off]
    text = "-" if not there else f"{statistics.fmean(there):.2f}"
    if len(there) > 1:
        text += f" ± {statistics.stdev(there):.2f}"
    lost = sum(line["diverged"])
    return text + (f" ({lost} of {len(line['diverged'])} diverged)" if lost else "")
