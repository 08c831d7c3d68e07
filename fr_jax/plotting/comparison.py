"""One figure of many runs: loss against epoch, loss against time, the headline number against epoch."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fr_jax._files import write_atomically
from fr_jax.plotting.curves import Rows, curve, is_finite, smoothed, time_unit
from fr_jax.plotting.style import COLOURS, page, plain_axes, png, set_log_scale
from fr_jax.training.task import ACCURACY, Headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Line", "comparison_figure", "looks", "plot_comparison"]

STROKES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))


class Line(NamedTuple):
    """Runs of several seeds (rows of ``metrics.jsonl``), drawn as their mean, with a band from least to greatest.

    The mean goes as far as the shortest run; those that go on are thin lines from there. Equal numbers ``colour`` and
    ``stroke`` look alike.
    """

    label: str
    runs: Sequence[Rows]
    colour: int
    stroke: int


def looks(methods: Sequence[str]) -> list[tuple[int, int]]:
    """Colour and stroke for each line, by its method: a colour per method, a stroke for each further line of it.

    If one method is varied, each line has a colour.

    Example:
      >>> looks(["bp", "fr", "bp"]), looks(["fr", "fr"])
      ([(0, 0), (1, 0), (0, 1)], [(0, 0), (1, 0)])
    """
    names = list(dict.fromkeys(methods))
    if len(names) == 1 or (len(names) == 2 and max(map(methods.count, names)) > 2):
        return [(i % len(COLOURS), i // len(COLOURS)) for i in range(len(methods))]
    return [(names.index(method), methods[:i].count(method)) for i, method in enumerate(methods)]


class Mean(NamedTuple):
    """``(n,)`` each: x, and y's mean, least and greatest over the seeds."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


TIME = "training time, compilation included"


def plot_comparison(lines: Sequence[Line], path: str | pathlib.Path, **text: Any) -> None:
    """Draws :func:`comparison_figure`, with its arguments, into a PNG file, which is replaced in one operation.

    Raises:
      ValueError: for no lines.
      OSError: the file cannot be written; an old one is intact.
    """
    write_atomically(path, png(comparison_figure(lines, **text)))


def comparison_figure(
    lines: Sequence[Line], *, title: str, data_source: str, time: str = TIME, headline: Headline = ACCURACY
) -> Figure:
    """Training loss (smoothed) against epoch and time, and the headline number against epoch; a cross: diverged.

    An accuracy is shown as error in percent. ``time`` says what the rows' seconds are; without any, there is no panel
    for them.
    """
    if not lines:
        raise ValueError("no runs to compare: give at least one line.")
    widest = max(len(line.label) for line in lines) + 13  # with "(× diverged)"
    columns = max(1, min(len(lines), 190 // (widest + 6)))
    drawing, space = page(14, 5.4 + 0.24 * math.ceil(len(lines) / columns), title, f"Data: {data_source}")
    timed = any(row.get("seconds") is not None for line in lines for rows in line.runs for row in rows)
    loss, *clocks, error = space.subplots(1, 3 if timed else 2)
    unit, seconds = time_unit({str(i): rows for i, rows in enumerate(rows for line in lines for rows in line.runs)})
    for line in reversed(lines):  # the first, the baseline, on top
        _draw(loss, line, "train_loss", "epoch", 1.0, headline)
        for clock in clocks:
            _draw(clock, line, "train_loss", "seconds", seconds, headline)
        _draw(error, line, f"test_{headline.name}", "epoch", 1.0, headline)
    _finish(loss, "epoch", "training loss")
    for clock in clocks:
        _finish(clock, f"{time} ({unit})", "training loss")
    _finish(error, "epoch", f"test {headline.label}")
    handles, labels = (found[::-1] for found in loss.get_legend_handles_labels())
    space.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    return drawing


def mean_over_runs(
    runs: Sequence[Rows], quantity: str, against: str, headline: Headline = ACCURACY
) -> tuple[Mean, bool]:
    """Step by step over the seeds, as far as all go that did not diverge; and whether one diverged.

    A step counts if all runs that reached it have a row: one that was resumed may have others than the rest. The
    headline number is shown as ``headline.compared`` gives it, everything else smoothed.
    """
    points = [_points(rows, quantity, against, headline) for rows in runs]
    end = _last_common(runs, points)
    steps = []
    for step in sorted(step for step in set().union(*points) if step <= end):
        reached = [own for own in points if own and max(own) >= step]
        if all(step in own for own in reached):
            steps.append([own[step] for own in reached])
    x = np.array([np.mean([x for x, _ in there]) for there in steps])
    ys = [[y for _, y in there] for there in steps]
    mean, low, high = (np.array([f(y) for y in ys]) for f in (np.mean, np.min, np.max))
    return Mean(x, mean, low, high), any(_diverged(rows) for rows in runs)


def _diverged(rows: Rows) -> bool:
    return curve(rows, "train_loss", "epoch").diverged  # a loss that is not finite is in the training rows


def _last_common(runs: Sequence[Rows], points: Sequence[dict[int, Any]]) -> float:
    """The last step of the shortest run: beyond it a mean would move because a seed is missing."""
    ends = [(max(own), _diverged(rows)) for rows, own in zip(runs, points, strict=True) if own]
    whole = [end for end, diverged in ends if not diverged]
    return min(whole) if whole else max((end for end, _ in ends), default=0)


def _points(rows: Rows, quantity: str, against: str, headline: Headline) -> dict[int, tuple[float, float]]:
    """Step -> (x, y), for the finite values."""
    there = [row for row in rows if is_finite(row.get(quantity)) and is_finite(row.get(against))]
    values = np.array([row[quantity] for row in there], float)
    y = headline.compared(values) if quantity == f"test_{headline.name}" else smoothed(values)
    return {row["step"]: (row[against], value) for row, value in zip(there, y.tolist(), strict=True)}


def _draw(axes: Axes, line: Line, quantity: str, against: str, scale: float, headline: Headline) -> None:
    mean, diverged = mean_over_runs(line.runs, quantity, against, headline)
    look: Any = {"color": COLOURS[line.colour % len(COLOURS)], "linestyle": STROKES[line.stroke % len(STROKES)]}
    # Few test points look like a smooth curve without markers, and a single one is invisible.
    sparse = len(mean.x) == 1 or (quantity.startswith("test_") and len(mean.x) <= 40)
    few: dict[str, Any] = {"marker": "o", "markersize": 4} if sparse else {}
    label = f"{line.label} (× diverged)" if diverged else line.label
    axes.plot(mean.x / scale, mean.y, label=label, linewidth=1.7, **few, **look)
    if len(line.runs) > 1:
        axes.fill_between(mean.x / scale, mean.low, mean.high, color=look["color"], alpha=0.15, linewidth=0)
        points = [_points(rows, quantity, against, headline) for rows in line.runs]
        end = _last_common(line.runs, points)
        for own in points:  # each run that goes on where the mean ends
            tail = np.array([own[step] for step in sorted(own) if step >= end])
            if len(tail) > 1:
                axes.plot(tail[:, 0] / scale, tail[:, 1], linewidth=0.9, alpha=0.6, **look)
    if diverged and len(mean.x):
        axes.plot(mean.x[-1:] / scale, mean.y[-1:], "X", color=look["color"], markersize=10, markeredgecolor="white")


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0)
    plain_axes(axes, which="both")
    shown = np.concatenate([np.asarray(one.get_ydata(), float) for one in axes.get_lines()] or [np.zeros(0)])
    shown = shown[np.isfinite(shown)]
    if len(shown):
        set_log_scale(axes, shown.min(), shown.max())
