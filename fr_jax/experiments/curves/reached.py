"""How long runs take to a training loss: the table of ``fr_jax.experiments.curves --losses``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fr_jax.experiments._cli.tables import markdown_table
from fr_jax.plotting.curves import Rows, is_finite, smoothed

__all__ = ["as_csv", "as_text", "reached", "table"]

COLUMNS = ("line", "run", "training_loss", "step", "epoch", "seconds")


def reached(rows: Rows, loss: float) -> Mapping[str, Any] | None:
    """The row of ``metrics.jsonl`` from which on the training loss, smoothed as it is drawn, stays below ``loss``.

    Example:
      >>> rows = [{"step": 10 * i, "train_loss": loss} for i, loss in enumerate([2.0, 0.9, 1.1, 0.8, 0.7])]
      >>> reached(rows, 1.0)
      {'step': 30, 'train_loss': 0.8}
      >>> reached(rows, 0.5) is None
      True
    """
    there = [row for row in rows if is_finite(row.get("train_loss"))]
    below = smoothed(np.array([row["train_loss"] for row in there], float)) < loss
    # One after the last that is not below: a curve may dip under the loss and come back.
    first = len(below) - int(np.argmin(below[::-1])) if not below.all() else 0
    return there[first] if first < len(there) else None


def table(lines: Mapping[str, Sequence[tuple[str, Rows]]], losses: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each loss and run; without step, epoch and seconds where the run never gets there.

    Args:
      lines: label -> the line's runs, each with its name.
      losses: of training.
    """
    rows = []
    for loss in losses:
        for label, runs in lines.items():
            for name, run in runs:
                at = reached(run, loss) or {}
                row = {"line": label, "run": name, "training_loss": loss}
                rows.append(row | {key: at.get(key) for key in ("step", "epoch", "seconds")})
    return rows


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The table as a file, in UTF-8; empty where a run never gets there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each line of the picture, with the mean minutes of its runs, and how the first line compares.

    Lines without a time are left out.

    Example:
      >>> rows = [{"line": "bp", "training_loss": 1.0, "step": 90, "seconds": 90.0},
      ...         {"line": "fr", "training_loss": 1.0, "step": 95, "seconds": 60.0}]
      >>> print(as_text(rows))
      | minutes until the training loss stays below (times as fast as bp) | 1          |
      | ----------------------------------------------------------------- | ---------- |
      | bp                                                                | 1.5        |
      | fr                                                                | 1.0 (1.50) |
    """
    timeless = {row["line"] for row in rows if row["step"] is not None and row["seconds"] is None}
    timed = [row for row in rows if row["line"] not in timeless]
    first, losses = rows[0]["line"], list(dict.fromkeys(row["training_loss"] for row in rows))
    minutes: dict[str, dict[float, list[float]]] = {}
    for row in timed:
        own = math.inf if row["seconds"] is None else row["seconds"] / 60
        minutes.setdefault(row["line"], {}).setdefault(row["training_loss"], []).append(own)
    mean = {line: [float(np.mean(own[loss])) for loss in losses] for line, own in minutes.items()}
    head = [
        f"minutes until the training loss stays below (times as fast as {first})",
        *(f"{loss:g}" for loss in losses),
    ]
    never = [math.inf] * len(losses)
    cells = [[line, *map(_cell, own, never if line == first else mean.get(first, never))] for line, own in mean.items()]
    return markdown_table(head, cells)


def _cell(minutes: float, beside: float) -> str:
    if math.isinf(minutes):
        return "never"
    return f"{minutes:.1f}" + ("" if math.isinf(beside) else f" ({beside / minutes:.2f})")
