"""What a comparison of runs comes to: a table, the same as JSON, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fr_jax.experiments.methods import METHODS
from fr_jax.training.comparison_plot import Line, plot_comparison
from fr_jax.training.data import Dataset
from fr_jax.training.files import write_atomically
from fr_jax.training.metrics import read_rows, write_json
from fr_jax.training.workdir import RunFolder

__all__ = ["Entry", "report"]


class Entry(NamedTuple):
    """Where a run stands: runs that differ in the seed alone share a line.

    Attributes:
      method: its short name.
      K: number of modules.
      variant: what was varied, in words; empty for nothing.
      seed: of the run.
    """

    method: str
    K: int
    variant: str
    seed: int

    @property
    def line(self) -> tuple[str, int, str]:
        """What runs of other seeds have in common with it."""
        return self[:3]

    @property
    def label(self) -> str:
        """The line, for people."""
        text = METHODS[self.method].title + ("" if self.method == "bp" else f", K = {self.K}")
        return f"{text}, {self.variant}" if self.variant else text


def report(home: Path, runs: Sequence[tuple[Entry, RunFolder]], dataset: Dataset, model: str, command: str) -> str:
    """Writes ``comparison.json``, ``table.md`` and ``comparison.png`` of the runs that are over; returns the table.

    Raises:
      OSError: the folder cannot be written.
    """
    lines: dict[tuple, list[tuple[Entry, RunFolder, dict[str, Any]]]] = {}
    for entry, folder in runs:
        summary = folder.saved_summary()
        if summary is not None:
            lines.setdefault(entry.line, []).append((entry, folder, summary))
    rows = [_row(members) for members in lines.values()]
    done, device = sum(map(len, lines.values())), "; ".join(sorted({row["device"] for row in rows}))
    heading = f"{model} on {dataset.source}; {device}; {done} of {len(runs)} runs are over."
    notes = [note for note in dict.fromkeys(METHODS[row["method"]].note for row in rows) if note]
    text = "\n\n".join([heading, table(rows), *notes])
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / "comparison.json", {"command": command, "data": dataset.source, "model": model, "lines": rows})
    write_atomically(home / "table.md", f"{text}\n\n    {command}\n".encode())
    if rows:
        colours = _looks([members[0][0] for members in lines.values()])
        pictured = [
            Line(members[0][0].label, [read_rows(folder.metrics) for _, folder, _ in members], *look)
            for members, look in zip(lines.values(), colours, strict=True)
        ]
        title = f"{model} on {dataset.name}: {', '.join(dict.fromkeys(entry.method for entry, _ in runs))}"
        source = ". ".join([dataset.source, *notes])
        plot_comparison(pictured, home / "comparison.png", title=title, data_source=source)
    return text


def _looks(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """A colour for each method and a stroke for each of its lines, or, where one method is varied, colours for all."""
    methods = list(dict.fromkeys(entry.method for entry in entries))
    most = max(sum(entry.method == method for entry in entries) for method in methods)
    if len(methods) <= 2 and most > 2:
        return [(number, 0) for number in range(len(entries))]
    seen: dict[str, int] = {}
    looks = []
    for entry in entries:
        looks.append((methods.index(entry.method), seen.get(entry.method, 0)))
        seen[entry.method] = looks[-1][1] + 1
    return looks


def _row(members: Sequence[tuple[Entry, RunFolder, dict[str, Any]]]) -> dict[str, Any]:
    """One line of the table: over its seeds."""
    entry, summaries = members[0][0], [summary for _, _, summary in members]
    losses = [_last(read_rows(folder.metrics), "train_loss") for _, folder, _ in members]
    return {
        "method": entry.method,
        "K": entry.K,
        "variant": entry.variant,
        "label": entry.label,
        "seeds": [member.seed for member, _, _ in members],
        "steps": [summary["steps"] for summary in summaries],
        "diverged": [summary["diverged"] for summary in summaries],
        "test_error": [_error(summary["test_accuracy"]) for summary in summaries],
        "best_test_error": [_error(summary["best_test_accuracy"]) for summary in summaries],
        "train_loss": losses,
        "seconds": [summary["seconds"] for summary in summaries],
        "step_seconds_median": [summary["step_seconds_median"] for summary in summaries],
        "device": summaries[0]["device"],
    }


def _error(accuracy: float | None) -> float | None:
    return None if accuracy is None else round(100 * (1 - accuracy), 4)


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """The mean over the last tenth of the training rows, at least one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    tail = values[-max(1, len(values) // 10) :]
    return round(statistics.fmean(tail), 6) if tail else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The lines as a Markdown table, readable as plain text too."""
    head = ("method", "test error %", "best %", "training loss", "seconds", "ms/step", "seeds")
    body = [
        (
            row["label"] + (" (diverged)" if any(row["diverged"]) else ""),
            _spread(row["test_error"], 2),
            _spread(row["best_test_error"], 2),
            _spread(row["train_loss"], 4),
            _spread(row["seconds"], 0),
            _spread([s and 1000 * s for s in row["step_seconds_median"]], 1),
            str(len(row["seeds"])),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    join = lambda line: "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
    return "\n".join([join(head), "| " + " | ".join("-" * width for width in widths) + " |", *map(join, body)])


def _spread(values: Sequence[float | None], digits: int) -> str:
    """``mean ± standard deviation`` over the seeds that have a value."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    mean = f"{statistics.fmean(there):.{digits}f}"
    return mean if len(there) == 1 else f"{mean} ± {statistics.stdev(there):.{digits}f}"
