"""The picture of the throughput program: images a second of each contestant, a panel for each network and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fr_jax.plotting.style import COLOURS, page, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["throughput_figure"]


def throughput_figure(result: Mapping[str, Any]) -> Figure:
    """A bar per contestant: its median images per second; dots are rounds."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["results"]:
        panels.setdefault(f"{row['model']}, {row['dtype']}", []).append(row)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    about = result["pytorch"]
    torch = f", PyTorch {about['torch']}" if about else ""
    note = f"{result['machine']}, jax {result['jax']}{torch}, {result['date']}"
    title = f"Training on one device, mini-batch {result['batch_size']}"
    drawing, space = page(6.5 * columns, lines * (0.9 + 0.42 * most) + 0.9, title, note)
    all_axes = space.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=False):
        for place, row in enumerate(rows):
            colour = COLOURS[1] if row["contestant"].startswith("PyTorch") else COLOURS[0]
            axes.barh(place, row["images_per_s"], height=0.66, color=colour, alpha=0.85, zorder=2)
            dots = [result["batch_size"] / seconds for seconds in row["rounds"]]
            axes.plot(dots, [place] * len(dots), "o", color="black", markersize=3, alpha=0.5, zorder=4)
            text = f" {row['images_per_s']:,.0f}"
            axes.text(0, place, text, va="center", color="white", fontsize=9, fontweight="bold", zorder=5)
        axes.set_yticks(range(len(rows)), [row["contestant"] for row in rows], fontsize=9)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11, fontweight="bold")
        plain_axes(axes, "x")
        axes.set_xlabel("images a second (dot: a round)", fontsize=9)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    return drawing
