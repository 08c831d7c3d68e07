"""The pictures of the BlockProp figures."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fr_jax.plotting.style import COLOURS, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]

BASELINE: dict[str, Any] = {"color": "black", "linewidth": 3.0, "zorder": 3}
FROZEN: dict[str, Any] = {"color": "0.55", "linewidth": 1.8, "linestyle": "--", "zorder": 3}
Lines = Sequence[Mapping[str, Any]]


def figure(result: Mapping[str, Any]) -> Figure:
    """The figure of the paper that ``result`` is of, for a notebook to show; it needs no display and no pyplot.

    Figure 2 has one panel more than the paper's: the accuracy of every run over how much of back-propagation's gradient
    its block 1 gets, beside back-propagation whose block 1 takes a smaller step.

    Args:
      result: what :func:`fr_jax.experiments.blockprop.result.summarise` returned, with at least one line.
    """
    return _figure_2(result) if result["figure"] == 2 else _figure_3(result)


def _figure_2(result: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    lines = result["lines"]
    families = list(dict.fromkeys(line["panel"] for line in lines if line["panel"].startswith(("h_steps", "penalty"))))
    drawing = Figure(figsize=(14, 9.2))
    grid = drawing.add_gridspec(2, max(len(families), 1), height_ratios=(1, 1.12))
    low, high = _limits(lines)
    for column, family in enumerate(families):
        panel = drawing.add_subplot(grid[0, column])
        _draw_curves(panel, lines, family, "test_accuracy", "epoch")
        panel.set_ylim(low, high)
        panel.set_title(_title(family), fontsize=11)
        panel.set_xlabel("epoch")
        if column == 0:
            panel.set_ylabel("test accuracy (%)")
        panel.legend(loc="lower right", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none", ncols=2)
    _draw_factors(drawing.add_subplot(grid[1, :]), lines, families)
    s = result["settings"]
    data = result["data"].split(":")[0]
    title = f"BlockProp, figure 2: a network with one hidden layer on {data}, two blocks"
    note = (
        f"{result['data']}. {s['width']} hidden units, batch {s['batch_size']}, γ = {s['learning_rate']:g}, "
        f"γ_h = {s['h_learning_rate']:g}; {_seeds(lines)}. {result['machine']}, jax {result['jax']}, {result['date']}."
    )
    _frame(drawing, title, note)
    drawing.subplots_adjust(left=0.055, right=0.985, bottom=0.095, top=0.905, wspace=0.14, hspace=0.27)
    return drawing


def _title(family: str) -> str:
    if family == "h_steps":
        return r"number of h-steps $N_h$, at $\lambda_1 = 1$"
    return rf"penalty $\lambda_1$, at $N_h = {re.sub('[^0-9]', '', family)}$"


def _seeds(lines: Lines) -> str:
    most = max(len(line["seeds"]) for line in lines)
    return "one seed" if most == 1 else f"means over {most} seeds, bands from the least to the greatest"


def _limits(lines: Lines) -> tuple[float, float]:
    """From a little below where the lines that learn begin; the others may leave the picture."""
    ends = [max(line["curves"]["test_accuracy"]["mean"]) for line in lines if "test_accuracy" in line["curves"]]
    if not ends:
        return 0.0, 100.0
    learning = [end for end in ends if end > 0.8 * max(ends)]
    span = max(max(ends) - min(learning), 0.5)
    return max(min(learning) - 0.7 * span, 0.0), min(max(ends) + 0.12 * span, 100.0)


def _colours(number: int) -> list[Any]:
    """Dark to light, for values that have an order."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.0, 0.9, max(number, 1))]


def _draw_curves(panel: Axes, lines: Lines, family: str, quantity: str, against: str) -> None:
    members = [line for line in lines if line["panel"] == family]
    for name, look in (("frozen", FROZEN), ("baseline", BASELINE)):
        for line in (line for line in lines if line["panel"] == name and quantity in line["curves"]):
            curve = line["curves"][quantity]
            panel.plot(curve[against], curve["mean"], label=line["label"], **look)
    for line, colour in zip(members, _colours(len(members)), strict=True):
        _draw_line(panel, line, quantity, against, {"color": colour})
    _plain(panel)


def _draw_line(panel: Axes, line: Mapping[str, Any], quantity: str, against: str, look: Mapping[str, Any]) -> None:
    lost = sum(line["diverged"])
    label = line["label"] + (" (diverged)" if lost else "")
    curve = line["curves"].get(quantity, {against: [], "mean": [], "low": [], "high": []})
    style: dict[str, Any] = {"linewidth": 1.6, "zorder": 4, **look}
    panel.plot(curve[against], curve["mean"], label=label, **style)
    if len(line["seeds"]) > 1:
        panel.fill_between(curve[against], curve["low"], curve["high"], color=look["color"], alpha=0.2, linewidth=0)


def _draw_factors(panel: Axes, lines: Lines, families: Sequence[str]) -> None:
    """Accuracy over the share of back-propagation's gradient that block 1 gets."""
    control = sorted((line["factor"], line) for line in lines if line["panel"] in ("control", "baseline"))
    ends = [(x, _end(line)) for x, line in control if _end(line) is not None]
    if ends:
        label = "back-propagation, block 1's step times x"
        panel.plot(*zip(*ends, strict=True), color="black", marker="o", linewidth=1.8, label=label, zorder=2)
    lost = []
    for number, family in enumerate(families):
        members = [line for line in lines if line["panel"] == family]
        shown = [line for line in members if line["factor"] > 1e-9 and _end(line) is not None]
        lost += [_fate(line) for line in members if line not in shown]
        _draw_family(panel, shown, f"BlockProp: {_title(family)}", number)
    for end in (_end(line) for line in lines if line["panel"] == "frozen"):
        if end is not None:
            panel.axhline(end, label="block 1 frozen: x = 0", **FROZEN)
    if lost:
        text = "not in the picture, since x is not above 0:\n" + "\n".join(lost)
        panel.text(0.995, 0.13, text, transform=panel.transAxes, ha="right", va="bottom", fontsize=9, color="0.25")
    panel.set_xscale("log")
    panel.set_xlabel(r"$x = 1 - (1 - 2\,\lambda_1\gamma_h)^{N_h}$: what block 1 gets of back-propagation's gradient")
    panel.set_ylabel("test accuracy at the end (%)")
    panel.legend(loc="upper left", fontsize=9.5, frameon=False)
    panel.margins(0.04, 0.1)
    _plain(panel)


def _draw_family(panel: Axes, lines: Lines, title: str, number: int) -> None:
    colour, marker = COLOURS[number % 4], "sD^v"[number % 4]
    panel.plot(
        [line["factor"] for line in lines],
        [end for line in lines if (end := _end(line)) is not None],
        linestyle="none",
        marker=marker,
        markersize=8,
        color=colour,
        alpha=0.85,
        zorder=4,
        label=title,
    )
    texts: dict[float, list[str]] = {}  # two values of lambda_1 may give the same factor
    for line in lines:
        texts.setdefault(round(line["factor"], 9), []).append(line["label"])
    places = {round(line["factor"], 9): _end(line) for line in lines}
    # Families whose points coincide do not hide each other's text: below to the right, above, and higher.
    offset = ((6, -5), (-6, 5), (-6, 17), (6, -17))[number % 4]
    side = {"ha": "left" if offset[0] > 0 else "right", "va": "bottom" if offset[1] > 0 else "top"}
    for x, labels in texts.items():
        text = " and ".join([labels[0], *(label.split("= ")[-1].join("$$") for label in labels[1:])]).replace("$$", "$")
        panel.annotate(text, (x, places[x]), offset, textcoords="offset points", fontsize=9, color=colour, **side)


def _fate(line: Mapping[str, Any]) -> str:
    end = "diverged" if all(line["diverged"]) else f"{_end(line):.0f} %"
    return rf"{line['label']}, $N_h = {line['h_steps']}$: $x = {line['factor']:.2g}$, {end}"


def _end(line: Mapping[str, Any]) -> float | None:
    there = [a for a, off in zip(line["test_accuracy"], line["diverged"], strict=True) if a is not None and not off]
    return statistics.fmean(there) if there else None


def _figure_3(result: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    quantities = {
        "gluing_loss": r"gluing loss $\Vert b_1(x) - h\Vert^2$, without $\lambda_1$",
        "train_loss": "training cross entropy, at $h$",
        "test_accuracy": "test accuracy (%)",
        "test_loss": "test loss",
    }
    lines, s = result["lines"], result["settings"]
    drawing = Figure(figsize=(13.5, 9.2))
    axes = drawing.subplots(2, 2, sharex=True)
    looks = _looks(lines)
    for panel, (quantity, title) in zip(axes.flat, quantities.items(), strict=True):
        for line, look in zip(lines, looks, strict=True):
            if quantity in line["curves"] or quantity == "test_accuracy":
                _draw_line(panel, line, quantity, "step", look)
        _plain(panel)
        panel.set_title(title, fontsize=11)
        values = [v for one in panel.get_lines() for v in np.asarray(one.get_ydata(), float) if math.isfinite(v)]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            panel.set_yscale("log")
    for panel in axes[1]:
        panel.set_xlabel("training iterations")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    columns = 3
    drawing.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.952), ncols=columns, frameon=False)
    rows = math.ceil(len(labels) / columns)
    title = f"BlockProp, figure 3: {s['model']} on {result['data'].split(':')[0]} in two blocks, $N_h = 1$"
    note = (
        f"{result['data']}. First {result['test_examples']:,} test images; batch {s['batch_size']}, momentum "
        f"{s['momentum']:g},\nγ_h = {s['h_learning_rate']:g}; {_seeds(lines)}; training curves smoothed. "
        f"{result['machine']}, jax {result['jax']}, {result['date']}."
    )
    _frame(drawing, title, note)
    drawing.subplots_adjust(left=0.06, right=0.985, bottom=0.105, top=0.915 - 0.024 * rows, wspace=0.13, hspace=0.13)
    return drawing


def _looks(lines: Lines) -> list[dict[str, Any]]:
    """Black for the baseline, an order of colours for lambda_1 at equal steps, dashes for blocks that differ."""
    equal = [
        n for n, one in enumerate(lines) if one["panel"] != "baseline" and len(set(one["block_learning_rates"])) < 2
    ]
    order = sorted(equal, key=lambda n: lines[n]["penalty"])
    colours = dict(zip(order, _colours(len(order)), strict=True))
    others = [n for n, one in enumerate(lines) if one["panel"] != "baseline" and n not in colours]
    dashed = {n: COLOURS[(1, 3, 5, 4)[place % 4]] for place, n in enumerate(others)}
    looks: list[dict[str, Any]] = []
    for n in range(len(lines)):
        if n in colours:
            looks.append({"color": colours[n]})
        elif n in dashed:
            looks.append({"color": dashed[n], "linestyle": "--", "linewidth": 2.0, "zorder": 5})
        else:
            looks.append(BASELINE)
    return looks


def _frame(drawing: Figure, title: str, note: str) -> None:
    drawing.suptitle(title, y=0.985, va="top", fontsize=14, fontweight="bold")
    drawing.text(0.5, 0.012, note, ha="center", fontsize=8.5, color="0.35")


def _plain(panel: Axes) -> None:
    plain_axes(panel)
