"""The picture of ``fr_jax.experiments.sufficient_direction``: figure 3 of the paper, and what σ is made of."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fr_jax._files import write_atomically
from fr_jax.plotting.style import COLOURS, page, plain_axes, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["direction_figure", "plot_directions", "standing_out"]

Rows = Sequence[Mapping[str, Any]]
PANELS = (
    ("sigma", "sufficient direction  σ = ⟨∇f, g⟩ / ‖∇f‖²"),
    ("cosine", "cosine of the angle between g and ∇f"),
    ("norm_ratio", "norm ratio  ‖g‖ / ‖∇f‖"),
)
NEIGHBOURS = 5


def plot_directions(
    rows: Rows, path: str | pathlib.Path, *, title: str, note: str, milestones: Sequence[float] = ()
) -> None:
    """Draws :func:`direction_figure` into a PNG file, replaced in one go.

    Raises:
      ValueError: for no rows.
      OSError: the file cannot be written; an old one is intact.
    """
    write_atomically(path, png(direction_figure(rows, title=title, note=note, milestones=milestones)))


def direction_figure(rows: Rows, *, title: str, note: str, milestones: Sequence[float] = ()) -> Figure:
    """σ, cosine and norm ratio of every stage against epoch; grey: the mini-batch's own gradient, all stages.

    Dots are measurements; lines go through them, or, where there are fifteen or more, through medians of five. Where a
    gradient does not stand out of the noise of its estimate there is no dot, and where three of five have none no line.
    What lies beyond an axis, which leaves one in fifty out, is a triangle at its edge.

    Args:
      rows: of ``sufficient_direction.jsonl``.
      title: one line over the figure.
      note: one line below it.
      milestones: epochs after which the learning rate fell; those within the run are marked.

    Raises:
      ValueError: for no rows.
    """
    if not rows:
        raise ValueError("no measurements to draw: give at least one row of sufficient_direction.jsonl.")
    drawing, space = page(14, 5.2, title, f"{_legend(rows, milestones)}\n{note}")
    axes = space.subplots(1, 3)
    for panel, (name, label) in zip(axes, PANELS, strict=True):
        _draw(panel, rows, name)
        _finish(panel, rows, name, label, milestones)
    handles, labels = axes[0].get_legend_handles_labels()
    space.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return drawing


def _legend(rows: Rows, milestones: Sequence[float]) -> str:
    """What the marks mean."""
    marks = ["Dots: measurements (a triangle: beyond the axis)"]
    if len(rows) >= 3 * NEIGHBOURS:
        marks.append(f"lines: medians of {NEIGHBOURS}")
    if any(milestone < rows[-1]["epoch"] for milestone in milestones):
        marks.append("dotted: the learning rate falls")
    left_out = np.mean(np.isnan(standing_out(rows, "norm_ratio")))
    if left_out:
        marks.append(f"left out: {100 * left_out:.0f} %, where ‖∇f‖² is not above twice its standard error")
    return "; ".join(marks) + "."


def standing_out(rows: Rows, name: str) -> np.ndarray:
    """A measured number, ``(measurements, stages)``; NaN where the gradient is lost in the noise of its estimate.

    Args:
      rows: of ``sufficient_direction.jsonl``; those of before the noise was estimated are taken as they are.
      name: sigma, cosine or norm_ratio.

    Example:
      >>> standing_out([{"sigma": [0.5, 9.0], "gradient_square": [4.0, 0.1], "square_noise": [1.0, 1.0]}], "sigma")
      array([[0.5, nan]])
    """
    values = np.array([row[name] for row in rows], float)
    if "square_noise" not in rows[0]:
        return values
    square, noise = (np.array([row[key] for row in rows], float) for key in ("gradient_square", "square_noise"))
    return np.where(square <= 2 * noise, np.nan, values)


def _draw(panel: Axes, rows: Rows, name: str) -> None:
    epochs = np.array([row["epoch"] for row in rows])
    for k, values in enumerate(standing_out(rows, name).T):
        _line(panel, epochs, values, f"stage {k + 1}", color=COLOURS[k % len(COLOURS)], linewidth=1.9)
    noise = standing_out([row["one_batch"]["network"] for row in rows], name)
    label = "one mini-batch's own gradient, whole network"
    _line(panel, epochs, noise, label, color="0.35", linewidth=1.5, linestyle="--")


def _line(panel: Axes, x: np.ndarray, y: np.ndarray, label: str, **look: Any) -> None:
    """Each measurement a dot, and a line through medians of five neighbours where there are many."""
    panel.plot(x, y, ".", color=look["color"], markersize=6, alpha=0.5, markeredgewidth=0)
    middle = y
    if len(y) >= 3 * NEIGHBOURS:
        reach = NEIGHBOURS // 2
        windows = [y[max(0, i - reach) : i + reach + 1] for i in range(len(y))]
        enough = [np.isfinite(one).sum() > len(one) / 2 for one in windows]
        middle = np.array([np.nanmedian(w) if e else np.nan for w, e in zip(windows, enough, strict=True)])
    panel.plot(x, middle, label=label, **look)


def _finish(panel: Axes, rows: Rows, name: str, label: str, milestones: Sequence[float]) -> None:
    panel.set_title(label, fontsize=10.5)
    panel.set_xlabel("epoch")
    panel.axhline(1 if name != "cosine" else 0, color="0.8", linewidth=1, zorder=0)
    shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in panel.get_lines()])
    shown = shown[np.isfinite(shown)]
    if name == "sigma":  # a wild first value must not hide the rest
        low, high = np.percentile(shown, [1, 99])
        margin = 0.08 * max(high - low, 1.0)
        panel.set_ylim(min(low - margin, -margin), max(high, 1.0) + margin)
        panel.axhline(0, color="0.3", linewidth=1, zorder=0)
    elif name == "norm_ratio":
        panel.set_ylim(0, 1.08 * max(np.percentile(shown, 99), 1.0))
    last = max(row["epoch"] for row in rows)
    for milestone in milestones:
        if milestone < last:
            panel.axvline(milestone, color="0.75", linewidth=1, linestyle=":", zorder=0)
    _mark_what_is_beyond(panel)
    plain_axes(panel)
    panel.margins(x=0.02)


def _mark_what_is_beyond(panel: Axes) -> None:
    low, high = panel.get_ylim()
    for dots in [line for line in panel.get_lines() if line.get_marker() == "."]:
        x, y = (np.asarray(data, float) for data in (dots.get_xdata(), dots.get_ydata()))
        for beyond, edge, marker in ((y > high, high, "^"), (y < low, low, "v")):
            if beyond.any():
                at = np.full(beyond.sum(), edge)
                panel.plot(x[beyond], at, marker, color=dots.get_color(), markersize=6, clip_on=False, zorder=3)
