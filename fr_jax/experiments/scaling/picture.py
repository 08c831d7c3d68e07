"""The picture of ``fr_jax.experiments.scaling``: speedup against devices, and against slow links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fr_jax.experiments.scaling.network import COMPARED, own_of
from fr_jax.plotting.style import COLOURS, page, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]

LEAST_SPEEDUP = 0.2
"""What is slower is not shown."""
MARKERS = "osD^vPX"
LOOKS = {
    name: (COLOURS[(i + 1) % len(COLOURS)], MARKERS[i % len(MARKERS)])  # features replay is vermilion everywhere
    for i, name in enumerate(COMPARED)
}


def figure(result: dict[str, Any]) -> Figure:
    """Speedup over back-propagation on one device, against K (left) and the transfer/compute ratio (right).

    Above for an ideal network, below for the model; dashed: the closed forms.

    Args:
      result: what ``fr_jax.experiments.scaling.simulated`` returned.
    """
    from matplotlib.lines import Line2D

    own = result["settings"]
    note = (
        f"Layers cost what {'XLA counts' if own['costs'] == 'flops' else 'was measured'}, mini-batch "
        f"{own['batch_size']}; weights are {result['weight_bytes_over_mean_feature_bytes']:.3g} times the features at "
        f"a cut ({result['mean_feature_bytes'] / 1e6:.3g} MB). {result['date']}.\nTransfer/compute ratio: the seconds "
        "in which these features cross a cut, over those of a step of back-propagation on one device."
    )
    drawing, space = page(12.5, 9.2, "Speedup over back-propagation on one device, simulated", note)
    axes = space.subplots(2, 2, sharex="col", sharey="row")
    K = max(*(row["K"] for row in result["by_K"]), own["ratio_K"])
    fastest = max(card.speedup(K, own_of(name, own["microbatches"])) or 0.0 for name, card in COMPARED.items())
    titles = {"ideal": "ideal network, cut anywhere", "model": f"{own['model']}, {result['layers']} layers"}
    for row, (which, title) in enumerate(titles.items()):
        _draw_by_K(axes[row, 0], result["by_K"], which)
        axes[row, 0].set_title(f"{title}; transfer/compute ratio {own['ratio']:g}", fontsize=10.5)
        axes[row, 0].set_ylabel("speedup")
        _draw_by_ratio(axes[row, 1], result["by_ratio"], which)
        axes[row, 0].set_ylim(LEAST_SPEEDUP, 1.5 * fastest)
        axes[row, 1].set_title(f"{title}; K = {own['ratio_K']}", fontsize=10.5)
    axes[1, 0].set_xlabel("devices K")
    axes[1, 1].set_xlabel("transfer/compute ratio")
    handles = [
        Line2D([], [], color=colour, marker=marker, label=COMPARED[name].titled(own_of(name, own["microbatches"])))
        for name, (colour, marker) in LOOKS.items()
    ]
    handles.append(Line2D([], [], color="0.45", linestyle="--", linewidth=1, label="closed form"))
    space.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return drawing


def _draw_by_K(axes: Axes, rows: list[dict[str, Any]], which: str) -> None:
    for name, (colour, marker) in LOOKS.items():
        bounds = [float("nan") if row["bounds"][name] is None else row["bounds"][name] for row in rows]
        axes.plot([row["K"] for row in rows], bounds, color=colour, linestyle="--", linewidth=1, alpha=0.8)
        there = [row for row in rows if row[which] is not None]
        values = [row[which][name] for row in there]
        # Points alone: without transfers they lie on the closed forms, whose lines are there already.
        line = "none" if which == "ideal" else "-"
        axes.plot([row["K"] for row in there], values, color=colour, marker=marker, markersize=5, linestyle=line)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    _finish(axes)


def _draw_by_ratio(axes: Axes, rows: list[dict[str, Any]], which: str) -> None:
    there = [row for row in rows if row[which] is not None]
    for name, (colour, marker) in LOOKS.items():
        ratios, values = [row["ratio"] for row in there], [row[which][name] for row in there]
        axes.plot(ratios, values, color=colour, marker=marker, markersize=5, linewidth=1.6)
    axes.set_xscale("log")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    plain_axes(axes)
