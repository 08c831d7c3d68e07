"""The picture of ``fr_jax.experiments.sufficient_direction``: figure 3 of the paper, and what σ is made of."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fr_jax.training.files import write_atomically
from fr_jax.training.plots import COLOURS, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["direction_figure", "plot_directions"]

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
    """σ, cosine and norm ratio of every module against epoch; grey: the mini-batch's own gradient, all modules.

    Dots are measurements; lines go through them, or, where there are fifteen or more, through means of five.

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
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(14, 5.2))
    drawing.suptitle(title, y=0.975, fontsize=13, fontweight="bold")
    drawing.text(0.5, 0.015, note, ha="center", fontsize=8.5, color="0.35")
    axes = drawing.subplots(1, 3)
    for panel, (name, label) in zip(axes, PANELS, strict=True):
        _draw(panel, rows, name)
        _finish(panel, rows, name, label, milestones)
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.94), ncols=len(labels), frameon=False)
    drawing.subplots_adjust(left=0.05, right=0.985, bottom=0.145, top=0.82, wspace=0.2)
    return drawing


def _draw(panel: Axes, rows: Rows, name: str) -> None:
    epochs = np.array([row["epoch"] for row in rows])
    values = np.array([row[name] for row in rows], float).reshape(len(rows), -1)
    for k in range(values.shape[1]):
        _line(panel, epochs, values[:, k], f"module {k + 1}", color=COLOURS[k % len(COLOURS)], linewidth=1.9)
    noise = np.array([row["one_batch"]["network"][name] for row in rows], float)
    label = "one mini-batch's own gradient, whole network"
    _line(panel, epochs, noise, label, color="0.35", linewidth=1.5, linestyle="--")


def _line(panel: Axes, x: np.ndarray, y: np.ndarray, label: str, **look: Any) -> None:
    """Each measurement a dot, and a line through means of five neighbours where there are many."""
    panel.plot(x, y, ".", color=look["color"], markersize=5, alpha=0.35, markeredgewidth=0)
    mean = y
    if len(y) >= 3 * NEIGHBOURS:
        reach = NEIGHBOURS // 2
        windows = [y[max(0, i - reach) : i + reach + 1] for i in range(len(y))]
        mean = np.array([np.mean(one[np.isfinite(one)]) if np.isfinite(one).any() else np.nan for one in windows])
    panel.plot(x, mean, label=label, **look)


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
    panel.grid(True, color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.02)
