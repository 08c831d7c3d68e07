"""The picture of ``fr_jax.experiments.time_to_loss``: extra updates of each recipe, and time to the loss by link."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fr_jax.experiments.time_to_loss.table import candidates, groups
from fr_jax.plotting.style import COLOURS, page, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]

STROKES = ("-", "--", ":", "-.")
COLUMNS = 4


def figure(result: Mapping[str, Any]) -> Figure:
    """Above, extra updates by recipe; below, a panel per optimizer, K and M: time to the loss against the ratio.

    Args:
      result: what ``fr_jax.experiments.time_to_loss.__main__.measure`` returned.
    """
    lines = [row for row in result["lines"] if row["K"] > 1 and row["extra_updates"] is not None]
    shown = list(groups(result))
    rows = math.ceil(len(shown) / COLUMNS)
    note = f"Data: {result['problem'].get('data_source')}. {result['machine']}, jax {result['jax']}, {result['date']}."
    if rows:
        note += (
            "\nBelow: updates times simulated seconds per update, over 1F1B with the same K and M; transfer/compute "
            "ratio: the seconds in which the features of a mini-batch cross a cut, over those of a step of "
            "back-propagation on one device."
        )
    height = 1.8 + 0.24 * max(len(lines), 1)
    title = f"{result['problem']['model']}: updates and time to back-propagation's loss"
    drawing, space = page(14, 1.6 + height + 3.6 * rows, title, note)
    above, *below = space.subfigures(
        1 + bool(rows), 1, height_ratios=[height, 3.6 * rows][: 1 + bool(rows)], squeeze=False
    )[:, 0]
    _draw_updates(above.subplots(), lines)
    if rows:
        panels = below[0].subplots(rows, min(COLUMNS, len(shown)), squeeze=False, sharex=True, sharey=True)
        for panel, group in zip(panels.flat, shown, strict=False):
            _draw_times(panel, result, *group)
        for panel in panels.flat[len(shown) :]:
            panel.set_visible(False)
        for panel in panels[:, 0]:
            panel.set_ylabel("time to the loss / 1F1B's")
    return drawing


def _draw_updates(panel: Axes, lines: list[Mapping[str, Any]]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in lines))
    for place, row in enumerate(lines):
        colour = COLOURS[(methods.index(row["method"]) + 1) % len(COLOURS)]
        percent = 100 * row["extra_updates"]
        spread = 100 * (row["extra_updates_deviation"] or 0.0)
        panel.barh(place, percent, xerr=spread or None, color=colour, alpha=0.85, height=0.7)
        beside = (max(percent + spread, 0), place)
        panel.annotate(f"{percent:.1f} %", beside, (4, 0), textcoords="offset points", va="center", fontsize=8)
    labels = [f"{row['optimizer']}, {row['label']}, {row['steps']:,} updates" for row in lines]
    panel.set_yticks(range(len(lines)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.1)
    panel.set_xscale("symlog", linthresh=10)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("extra updates to back-propagation's loss (%)")
    plain_axes(panel, "x")


def _draw_times(panel: Axes, result: Mapping[str, Any], optimizer: str, K: int, M: int) -> None:
    found = candidates(result, optimizer, K, M)
    ratios = [f"{ratio:g}" for ratio in result["settings"]["ratios"]]
    methods = list(dict.fromkeys(one.method for one in found))
    for i, one in enumerate(found):
        stroke = sum(other.method == one.method for other in found[:i])
        look = {"color": COLOURS[methods.index(one.method) % len(COLOURS)], "linestyle": STROKES[stroke % len(STROKES)]}
        times = [one.time(ratio) / found[0].time(ratio) for ratio in ratios]
        memory = f" ({one.memory / found[0].memory:.2f} of its memory)" if i else ""
        panel.plot(range(len(ratios)), times, label=f"{one.label}{memory}", marker="o", markersize=3, **look)
    panel.set_xticks(range(len(ratios)), ratios)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_xlabel("transfer/compute ratio")
    panel.set_title(f"{optimizer}, K = {K}, M = {M}", fontsize=10)
    panel.legend(fontsize=6, frameon=False)
    plain_axes(panel, which="both")
