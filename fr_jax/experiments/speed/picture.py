"""The picture of the speed program: how many times as fast as back-propagation each method is, and could be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fr_jax.plotting.style import COLOURS, page, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["speed_figure"]


def speed_figure(result: Mapping[str, Any]) -> Figure:
    """A bar per contestant: its median speedup over back-propagation on one device; dots: rounds, line: the bound."""
    rows = result["results"]
    baseline = rows[result["baseline"]]["seconds_median"]
    title = f"{result['model']}, mini-batch {result['batch_size']}, K = {result['K']}, {result['placement']}"
    note = f"{result['machine']}, jax {result['jax']}, {result['date']}"
    drawing, space = page(10, 1.7 + 0.5 * len(rows), title, note)
    axes = space.subplots()
    right = 1.0
    for place, row in enumerate(rows.values()):
        colour = COLOURS[1] if row["method"] == "fr" and row["cuts"] else COLOURS[0]
        axes.barh(place, row["speedup"], height=0.62, color=colour, alpha=0.85, zorder=2)
        dots = [baseline / seconds for seconds in row["rounds"]]
        axes.plot(dots, [place] * len(dots), "o", color="black", markersize=3, alpha=0.5, zorder=4)
        right = max(right, *dots, row["bound"] or 0.0)
        if row["bound"] is not None:
            axes.plot([row["bound"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2.2, zorder=3)
        text = f"{row['speedup']:.2f}  ({row['seconds_median']:.3g} s)"
        axes.text(0.02, place, text, va="center", color="white", fontsize=9, fontweight="bold", zorder=5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, right * 1.04)
    axes.set_xlabel("times as fast as back-propagation on one device (dot: a round; black line: the bound)")
    plain_axes(axes, "x")
    return drawing
