"""Curves of one or several runs as a PNG: the loss and the headline number, against epoch and against time."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fr_jax._files import write_atomically
from fr_jax.plotting.style import COLOURS, page, plain_axes, png, set_log_scale
from fr_jax.training.task import ACCURACY, Headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Rows = Sequence[Mapping[str, Any]]

_SMOOTH_SHARE = 1 / 25
_TIME_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))


class Curve(NamedTuple):
    """One quantity of one run: ``(n,)`` finite ``y`` over ``x``; whether values that are not finite were left out."""

    x: np.ndarray
    y: np.ndarray
    diverged: bool


def plot_curves(runs: Mapping[str, Rows], path: str | pathlib.Path, **text: Any) -> None:
    """Draws :func:`figure`, with its arguments, into a PNG file, which is replaced in one operation.

    Raises:
      ValueError: for no runs.
      OSError: the file cannot be written; an old one is intact.
    """
    write_atomically(path, png(figure(runs, **text)))


def figure(runs: Mapping[str, Rows], *, title: str, data_source: str, headline: Headline = ACCURACY) -> Figure:
    """The curves of ``runs``, rows of ``metrics.jsonl`` by label (``"FR, K = 4"``), without pyplot.

    Row 1 is the loss, row 2 the headline number; column 1 against epoch, column 2 against time. Thin: training,
    smoothed, with the raw values pale behind. Thick with markers: test. A note below states the ``data_source``.
    """
    if not runs:
        raise ValueError("no runs to plot: give at least one label with its rows.")
    drawing, space = page(11, 7, title, f"Data: {data_source}")
    axes = space.subplots(2, 2, sharex="col", sharey="row")
    unit, seconds_per_unit = time_unit(runs)
    for row, quantity in enumerate((Headline("loss"), headline)):
        for column, (against, scale) in enumerate((("epoch", 1.0), ("seconds", seconds_per_unit))):
            for number, rows in enumerate(runs.values()):
                _draw_run(axes[row, column], rows, quantity, against, scale, COLOURS[number % len(COLOURS)])
        _set_limits(axes[row, 0], runs, quantity)
        axes[row, 0].set_ylabel(f"{quantity.words} (%)" if quantity.fraction else quantity.words)
    axes[1, 0].set_xlabel("epoch")
    axes[1, 1].set_xlabel(f"training time ({unit})")
    for panel in axes.flat:
        plain_axes(panel)
    for column in axes.T:  # shared axes lose their margin when only the left end is set: the last marker would be cut
        ends = [panel.dataLim.x1 for panel in column if np.isfinite(panel.dataLim.x1)]
        column[0].set_xlim(0, 1.02 * max(ends, default=1.0) or 1.0)
    _add_legend(space, runs)
    return drawing


def curve(rows: Rows, quantity: str, against: str) -> Curve:
    """The finite points of ``quantity`` (``"train_loss"``) over ``against`` (``"epoch"`` or ``"seconds"``)."""
    points = [(row[against], row[quantity]) for row in rows if quantity in row and is_finite(row.get(against))]
    finite = [(x, y) for x, y in points if is_finite(y)]
    x, y = np.asarray(finite, dtype=float).reshape(-1, 2).T
    return Curve(x, y, diverged=len(finite) < len(points))


def smoothed(values: np.ndarray) -> np.ndarray:
    """``(n,)`` -> ``(n,)``: the mean over a window of n / 25 values around each, cut off at the ends."""
    half = int(len(values) * _SMOOTH_SHARE / 2)
    if half == 0:
        return values
    # Differences of running sums: O(n) for every width of the window.
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def is_finite(value: Any) -> bool:
    """Whether a row has a value here that can be drawn."""
    return value is not None and math.isfinite(value)


def _diverged(rows: Rows) -> bool:
    return curve(rows, "train_loss", "epoch").diverged or curve(rows, "test_loss", "epoch").diverged


def _draw_run(axes: Axes, rows: Rows, quantity: Headline, against: str, scale: float, colour: str) -> None:
    train, test = (curve(rows, f"{split}_{quantity.name}", against) for split in ("train", "test"))
    factor = 100.0 if quantity.fraction else 1.0
    y = train.y * factor
    mean = smoothed(y)
    if mean is not y:
        axes.plot(train.x / scale, y, color=colour, linewidth=0.6, alpha=0.18, zorder=1)
    # A line of one point would be invisible.
    lone = "." if len(mean) == 1 else None
    axes.plot(train.x / scale, mean, color=colour, linewidth=1.1, alpha=0.75, zorder=2, marker=lone)
    every = max(1, math.ceil(len(test.x) / 25))
    style = {"linewidth": 2.1, "marker": "o", "markersize": 4.5, "markevery": every, "zorder": 3}
    axes.plot(test.x / scale, test.y * factor, color=colour, **style)
    if quantity.name == "loss" and _diverged(rows) and len(train.x):
        cross = {"marker": "X", "markersize": 11, "color": colour, "markeredgecolor": "white", "zorder": 4}
        axes.plot(train.x[-1:] / scale, mean[-1:], linestyle="none", clip_on=False, **cross)


def _set_limits(axes: Axes, runs: Mapping[str, Rows], quantity: Headline) -> None:
    """Limits for the smoothed training curves and the test curves; raw values may leave the picture."""
    names = (f"train_{quantity.name}", f"test_{quantity.name}")
    curves = [curve(rows, name, "epoch").y for rows in runs.values() for name in names]
    shown = np.concatenate([smoothed(y) for y in curves]) * (100.0 if quantity.fraction else 1.0)
    if not len(shown):
        return
    low, high = float(shown.min()), float(shown.max())
    if quantity.fraction:
        margin = max(0.06 * (high - low), 1.0)
        axes.set_ylim(max(low - margin, -2.0), min(high + margin, 102.0))
    elif set_log_scale(axes, low, high):
        axes.set_ylim(low / 1.4, high * 1.4)
    else:
        margin = max(0.06 * (high - low), 0.02 * abs(high), 1e-6)
        axes.set_ylim(0.0 if 0 <= low < 0.3 * high else low - margin, high + margin)


def _add_legend(space: SubFigure, runs: Mapping[str, Rows]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for number, (label, rows) in enumerate(runs.items()):
        text = f"{label} (× diverged)" if _diverged(rows) else label
        handles.append(Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=5, label=text))
    handles.append(Line2D([], [], color="0.3", linewidth=1.1, label="training"))
    handles.append(Line2D([], [], color="0.3", linewidth=2.1, marker="o", markersize=4.5, label="test"))
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), 150 // (widest + 9)))
    space.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def time_unit(runs: Mapping[str, Rows]) -> tuple[str, float]:
    """The largest unit of which the longest run lasted at least two."""
    seconds = [row["seconds"] for rows in runs.values() for row in rows if is_finite(row.get("seconds"))]
    longest = max(seconds, default=0.0)
    return next(((name, size) for name, size in _TIME_UNITS if longest >= 2 * size), _TIME_UNITS[-1])
