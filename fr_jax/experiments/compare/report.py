"""What a comparison of runs comes to: a table, the same as JSON, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fr_jax._files import write_atomically, write_json
from fr_jax.experiments._cli.tables import markdown_table, mean_and_deviation
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._run.tasks import Data
from fr_jax.plotting.comparison import Line, looks, plot_comparison
from fr_jax.training.metrics_log import read_rows
from fr_jax.training.run_folder import RunFolder, WorkdirError
from fr_jax.training.task import ACCURACY, Headline

__all__ = ["Entry", "report"]


class Entry(NamedTuple):
    """Where a run stands: its method, K, what was varied (in words, or empty), seed and M; seeds share a line."""

    method: str
    K: int
    variant: str
    seed: int
    M: int = 1

    @property
    def line(self) -> tuple[str, int, str, int]:
        """What runs of other seeds have in common with it."""
        return (self.method, self.K, self.variant, self.M)

    @property
    def label(self) -> str:
        """The line, for people."""
        text = METHODS[self.method].titled({"microbatches": self.M}, "" if self.method == "bp" else f", K = {self.K}")
        return f"{text}, {self.variant}" if self.variant else text

    @classmethod
    def of(cls, values: Sequence[Any]) -> Entry:
        """From JSON; an earlier version left M out, which was the method's own."""
        entry = cls(*values)
        own_M = METHODS[entry.method].defaults.get("microbatches", 1)
        return entry if len(values) == len(cls._fields) else entry._replace(M=own_M)


class Run(NamedTuple):
    """A run that is over: where it stands, its folder's name, what it was set to, how it ended, and its rows."""

    entry: Entry
    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def report(home: Path, planned: Mapping[str, Entry], data: Data, model: str, command: str) -> str:
    """Writes ``comparison.json``, ``table.md`` and ``comparison.png`` of the runs that are over; returns the table.

    Runs of earlier comparisons in the folder ``home`` stay in the table. ``planned`` has this comparison's runs by the
    names of their folders; ``command`` gives it again. A WorkdirError names a file of a run that is damaged.
    """
    entries = {**_earlier(home), **planned}
    runs = [run for name, entry in entries.items() if (run := _read(home, name, entry)) is not None]
    lines: dict[tuple, list[Run]] = {}
    for run in runs:
        lines.setdefault(run.entry.line, []).append(run)
    headline = Headline.of(runs[0].config if runs else {})
    rows = [_row(members, headline) for members in lines.values()]
    heading = f"{model} on {data.source}; {len(runs)} of {len(entries)} runs are over."
    notes = [note for note in dict.fromkeys(METHODS[row["method"]].note for row in rows) if note]
    text = "\n\n".join([heading, table(rows, headline), " ".join([_how_to_read(headline), *notes])])
    content = {
        "command": command,
        "data": data.source,
        "model": model,
        "runs": {run.name: list(run.entry) for run in runs},
        "lines": rows,
    }
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / "comparison.json", content)
    write_atomically(home / "table.md", f"{text}\n\n    {command}\n".encode())
    if rows:
        pictured = [
            Line(members[0].entry.label, [run.rows for run in members], *look)
            for members, look in zip(lines.values(), looks([key[0] for key in lines]), strict=True)
        ]
        title = f"{model} on {data.name}: {', '.join(dict.fromkeys(run.entry.method for run in runs))}"
        source = " ".join([f"{data.source}.", *notes])
        plot_comparison(pictured, home / "comparison.png", title=title, data_source=source, headline=headline)
    return text


def _how_to_read(headline: Headline) -> str:
    what = "Errors are" if headline.fraction else f"The {headline.words} are"
    return (
        f"{what} those on the test set after the last step, and at the best evaluation; the training loss is the mean "
        "of the last tenth of its rows; seconds are those of training, compilation included; ± is the standard "
        "deviation over seeds. Seeds that diverged are left out."
    )


def _earlier(home: Path) -> dict[str, Entry]:
    """The runs of the comparison that the folder holds, by the names of their folders."""
    try:
        saved = json.loads((home / "comparison.json").read_text(encoding="utf-8"))["runs"]
        return {name: Entry.of(values) for name, values in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none yet, or none that can be read: it is written anew


def _read(home: Path, name: str, entry: Entry) -> Run | None:
    folder = RunFolder(home / name)
    summary = folder.saved_summary()
    if summary is None:
        return None
    try:
        return Run(entry, name, folder.saved_config() or {}, summary, read_rows(folder.metrics))
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"the metrics of {folder.path} cannot be read: {error}. Move that folder away, and the run is made again."
        ) from None


def _row(members: Sequence[Run], headline: Headline) -> dict[str, Any]:
    """One line of the table: over its seeds."""
    entry, summaries = members[0].entry, [run.summary for run in members]
    scores = {
        f"{prefix}test_{headline.compared_name}": [
            None if (x := summary.get(f"{prefix}test_{headline.name}")) is None else round(headline.compared(x), 4)
            for summary in summaries
        ]
        for prefix in ("", "best_")
    }
    return {
        "method": entry.method,
        "K": entry.K,
        "microbatches": entry.M,
        "variant": entry.variant,
        "label": entry.label,
        "seeds": [run.entry.seed for run in members],
        "learning_rate": members[0].config.get("learning_rate"),
        "steps": [summary["steps"] for summary in summaries],
        "diverged": [summary["diverged"] for summary in summaries],
        **scores,
        "train_loss": [_last(run.rows, "train_loss") for run in members],
        "seconds": [summary["seconds"] for summary in summaries],
        "step_seconds_median": [summary["step_seconds_median"] for summary in summaries],
        "device": summaries[0]["device"],
    }


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """The mean over the last tenth of the training rows, at least one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    tail = values[-max(1, len(values) // 10) :]
    return round(statistics.fmean(tail), 6) if tail else None


def table(rows: Sequence[dict[str, Any]], headline: Headline = ACCURACY) -> str:
    """The lines as a Markdown table, readable as plain text too."""
    scores = (f"test {headline.label}".replace("(%)", "%"), "best %" if headline.fraction else "best")
    head = ("method", "lr", *scores, "training loss", "steps", "seconds", "ms/step", "seeds", "devices")
    digits = 2 if headline.fraction else 4
    body = [
        (
            row["label"] + _divergences(row["diverged"]),
            f"{row['learning_rate']:g}" if row["learning_rate"] is not None else "-",
            *(_spread(row, f"{prefix}test_{headline.compared_name}", digits) for prefix in ("", "best_")),
            _spread(row, "train_loss", 4),
            f"{max(row['steps']):,}",
            _spread(row, "seconds", 0),
            _spread(row, "step_seconds_median", 1, scale=1000),
            str(len(row["seeds"])),
            row["device"],
        )
        for row in rows
    ]
    return markdown_table(head, body)


def _divergences(diverged: Sequence[bool]) -> str:
    some = "" if all(diverged) else f"{sum(diverged)} of {len(diverged)} "
    return f" ({some}diverged)" if any(diverged) else ""


def _spread(row: dict[str, Any], name: str, digits: int, scale: float = 1.0) -> str:
    """``mean ± standard deviation`` over the seeds that did not diverge and have a value."""
    values = [None if value is None else scale * value for value in row[name]]
    return mean_and_deviation(values, row["diverged"], digits)
