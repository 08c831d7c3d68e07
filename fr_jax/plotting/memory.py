"""Figure 5 of the features replay paper: memory by method and number of modules, stacked by what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fr_jax.plotting.style import plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LAYERS", "memory_figure"]

LAYERS = {
    "weights, optimizer": (("parameters", "optimizer", "statistics"), 1.0),
    "history of past mini-batches": (("history",), 0.62),
    "activations of the step": (("batch", "residuals", "temporaries"), 0.3),
}
"""What a bar is made of, from the bottom: the kinds of memory, and how strong the colour is."""


def memory_figure(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], colours: Mapping[str, str], *, title: str, note: str
) -> Figure:
    """One panel a model, one group of bars a K, one bar a method: the sum over devices of their peaks, in MB (10^6).

    Args:
      rows: ``model``, ``K``, ``method``, ``peak`` (bytes by kind) and ``ratio`` (of the whole to back-propagation's).
      labels: method -> what the legend says, in the order of the bars.
      colours: method -> colour.
      title: over the figure.
      note: below it.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to draw: give at least one model, K and method.")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    models = list(dict.fromkeys(row["model"] for row in rows))
    width, height = max(9.0, 1.5 + 5.2 * len(models)), 5.8
    drawing = Figure(figsize=(width, height))
    panels = drawing.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        _draw(panel, [row for row in rows if row["model"] == model], list(labels), colours)
        panel.set_title(model, fontsize=11)
    panels[0].set_ylabel("peak memory, sum over devices (MB)")
    handles = [Patch(facecolor=colours[method], label=label) for method, label in labels.items()]
    handles += [Patch(facecolor="black", alpha=strength, label=name) for name, (_, strength) in LAYERS.items()]
    drawing.suptitle(title, y=0.975, fontweight="bold")
    columns, rows_of_legend = 3, (len(handles) + 2) // 3
    drawing.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.95), ncols=columns, frameon=False, fontsize=9
    )
    drawing.text(0.5, 0.015, note, ha="center", fontsize=8.5, color="0.35")
    top = 1 - (0.85 + 0.22 * rows_of_legend) / height
    drawing.subplots_adjust(left=0.85 / width, right=1 - 0.15 / width, bottom=0.85 / height, top=top, wspace=0.2)
    return drawing


def _draw(panel: Axes, rows: Sequence[Mapping[str, Any]], methods: Sequence[str], colours: Mapping[str, str]) -> None:
    Ks = sorted({row["K"] for row in rows})
    width = 0.84 / len(methods)
    for row in rows:
        place = methods.index(row["method"])
        x, bottom = Ks.index(row["K"]) + (place - (len(methods) - 1) / 2) * width, 0.0
        for kinds, strength in LAYERS.values():
            height = sum(row["peak"][kind] for kind in kinds) / 1e6
            panel.bar(x, height, 0.92 * width, bottom=bottom, color=colours[row["method"]], alpha=strength)
            bottom += height
        panel.axhline(bottom / row["ratio"], color="0.35", linestyle=":", linewidth=1, zorder=0)
        panel.annotate(
            f"{row['ratio']:.2f}", (x, bottom), (0, 2), textcoords="offset points", ha="center", fontsize=7.5
        )
    panel.set_xticks(range(len(Ks)), [f"K = {K}" for K in Ks])
    panel.margins(y=0.08)
    plain_axes(panel, "y")
