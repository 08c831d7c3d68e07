"""Figure 5 of the features replay paper: memory by method and number of stages, stacked by what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fr_jax.experiments.memory.methods import CONTESTANTS
from fr_jax.plotting.style import COLOURS, page, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]

LAYERS = {
    "weights, optimizer": (("parameters", "optimizer", "statistics"), 1.0),
    "history of past mini-batches": (("history",), 0.62),
    "activations of the step": (("batch", "residuals", "temporaries"), 0.3),
}
"""What a bar is made of, from the bottom: the kinds of memory, and how strong the colour is."""


def figure(result: Mapping[str, Any]) -> Figure:
    """One panel per model, one group of bars per K, one bar per method: the sum over devices of their peaks, in MB.

    Args:
      result: what :func:`fr_jax.experiments.memory.__main__.measure` returned.
    """
    from matplotlib.patches import Patch

    s, rows = result["settings"], result["rows"]
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(s["methods"])}
    note = (
        f"Batch {s['batch_size']}, {result['optimizer']}. Numbers and dotted line: ratio to back-propagation on one "
        f"device.\nXLA's plans for {result['backend']}, jax {result['jax']}, {result['date']}."
    )
    width = max(5.2, 0.3 * len(rows) / len(s["models"]))
    drawing, space = page(max(9.0, 1.5 + width * len(s["models"])), 5.8, "Memory of a training step", note)
    panels = space.subplots(1, len(s["models"]), squeeze=False)[0]
    for panel, model in zip(panels, s["models"], strict=True):
        _draw(panel, [row for row in rows if row["model"] == model], colours)
        panel.set_title(model, fontsize=11)
    panels[0].set_ylabel("peak memory, sum over devices (MB)")
    handles = [Patch(facecolor=colour, label=CONTESTANTS[method].title) for method, colour in colours.items()]
    handles += [Patch(facecolor="black", alpha=strength, label=name) for name, (_, strength) in LAYERS.items()]
    space.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return drawing


def _draw(panel: Axes, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    bars = list(dict.fromkeys((row["method"], row["microbatches"]) for row in rows))
    Ks = sorted({row["K"] for row in rows})
    width = 0.84 / len(bars)
    for row in rows:
        place, M = bars.index((row["method"], row["microbatches"])), row["microbatches"]
        x, bottom = Ks.index(row["K"]) + (place - (len(bars) - 1) / 2) * width, 0.0
        for kinds, strength in LAYERS.values():
            height = sum(row["peak"][kind] for kind in kinds) / 1e6
            panel.bar(x, height, 0.92 * width, bottom=bottom, color=colours[row["method"]], alpha=strength)
            bottom += height
        panel.axhline(bottom / row["ratio"], color="0.35", linestyle=":", linewidth=1, zorder=0)
        text = f"{row['ratio']:.2f}" + (f", M = {M}" if M > 1 else "")
        upright: dict[str, Any] = {"rotation": 90 if max(M for _, M in bars) > 1 else 0, "fontsize": 7.5}
        panel.annotate(text, (x, bottom), (0, 2), textcoords="offset points", ha="center", **upright)
    panel.set_xticks(range(len(Ks)), [f"K = {K}" for K in Ks])
    panel.margins(y=0.08)
    plain_axes(panel, "y")
