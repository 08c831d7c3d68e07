"""The pictures of the BlockProp figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fr_jax.plotting.style import COLOURS, page, plain_axes, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]

BASELINE: dict[str, Any] = {"color": "black", "linewidth": 3.0, "zorder": 3}
FROZEN: dict[str, Any] = {"color": "0.55", "linewidth": 1.8, "linestyle": "--", "zorder": 3}
Line = Mapping[str, Any]


def figure(result: Mapping[str, Any]) -> Figure:
    """The figure of the paper that ``result`` is of, for a notebook to show; it needs no display and no pyplot.

    Figure 2 has one panel more than the paper's: the accuracy of every run over how much of back-propagation's gradient
    its block 1 gets, beside back-propagation whose block 1 takes a smaller step.

    Args:
      result: what :func:`fr_jax.experiments.blockprop.result.summarise` returned, with at least one line.
    """
    s, data, seeds = result["settings"], result["data"], max(len(line["seeds"]) for line in result["lines"])
    note = (
        f"{data}. {result['test_examples']:,} test images; batch {s['batch_size']}, momentum {s['momentum']:g}, "
        f"γ_h = {s['h_learning_rate']:g}; "
        + ("one seed" if seeds == 1 else f"means over {seeds} seeds, bands from the least to the greatest")
        + f".\n{result['machine']}, jax {result['jax']}, {result['date']}."
    )
    network = f"{s['width']} hidden units" if result["figure"] == 2 else s["model"]
    title = f"BlockProp, figure {result['figure']}: {network} on {data.split(':')[0]} in two blocks"
    drawing, space = page(14, 9.2, title, note)
    if result["figure"] == 3:
        _draw_figure_3(space, result["lines"])
        return drawing
    lines = result["lines"]
    families = list(dict.fromkeys(line["panel"] for line in lines if line["panel"].startswith(("h_steps", "penalty"))))
    grid = space.add_gridspec(2, max(len(families), 1), height_ratios=(1, 1.12))
    for column, family in enumerate(families):
        _draw_family(space.add_subplot(grid[0, column]), lines, family)
    _draw_factors(space.add_subplot(grid[1, :]), lines, families)
    return drawing


def _title(family: str) -> str:
    if family == "h_steps":
        return r"number of h-steps $N_h$, at $\lambda_1 = 1$"
    return rf"penalty $\lambda_1$, at $N_h = {re.sub('[^0-9]', '', family)}$"


def _end(line: Line) -> float | None:
    """The test accuracy in percent after the last step; None where all runs diverged."""
    there = [a for a, lost in zip(line["test_accuracy"], line["diverged"], strict=True) if a is not None and not lost]
    return statistics.fmean(there) if there else None


def _draw_family(panel: Axes, lines: Sequence[Line], family: str) -> None:
    """Test accuracy over epochs, beside back-propagation and a frozen block 1."""
    looks = {"baseline": BASELINE, "frozen": FROZEN}
    beside = [(line, looks[line["panel"]]) for line in lines if line["panel"] in looks]
    members = [line for line in lines if line["panel"] == family]
    for line, look in (*beside, *zip(members, ({"color": one} for one in shades(len(members))), strict=True)):
        _draw_line(panel, line, "test_accuracy", "epoch", look)
    ends = [max(line["curves"]["test_accuracy"]["mean"]) for line in lines if "test_accuracy" in line["curves"]]
    learning = [end for end in ends if end > 0.8 * max(ends)]
    if learning:  # lines that do not learn may leave the picture
        span = max(max(learning) - min(learning), 0.5)
        panel.set_ylim(max(min(learning) - 0.7 * span, 0.0), min(max(learning) + 0.12 * span, 100.0))
    plain_axes(panel)
    panel.set_title(_title(family), fontsize=11)
    panel.set_xlabel("epoch")
    panel.set_ylabel("test accuracy (%)")
    panel.legend(loc="lower right", fontsize=8.5, framealpha=0.9, edgecolor="none", ncols=2)


def _draw_line(panel: Axes, line: Line, quantity: str, against: str, look: Mapping[str, Any]) -> None:
    curve = line["curves"].get(quantity, {against: [], "mean": [], "low": [], "high": []})
    style: dict[str, Any] = {"linewidth": 1.6, "zorder": 4, **look}
    label = line["label"] + (" (diverged)" if any(line["diverged"]) else "")
    panel.plot(curve[against], curve["mean"], label=label, **style)
    if len(line["seeds"]) > 1:
        panel.fill_between(curve[against], curve["low"], curve["high"], color=look["color"], alpha=0.2, linewidth=0)


def _draw_factors(panel: Axes, lines: Sequence[Line], families: Sequence[str]) -> None:
    """Accuracy over the share of back-propagation's gradient that block 1 gets."""
    ends = [(line, line["factor"], end) for line in lines if (end := _end(line)) is not None]
    control = sorted((x, end) for line, x, end in ends if line["panel"] in ("control", "baseline"))
    if control:
        label = "back-propagation, block 1's step times x"
        panel.plot(*zip(*control, strict=True), "o-", color="black", linewidth=1.8, label=label, zorder=2)
    for number, family in enumerate(families):
        shown = [(x, end, line["label"]) for line, x, end in ends if line["panel"] == family and x > 1e-9]
        look: dict[str, Any] = {"color": COLOURS[number % 4], "marker": "sD^v"[number % 4], "markersize": 8}
        label = f"BlockProp: {_title(family)}"
        panel.plot([x for x, *_ in shown], [y for _, y, _ in shown], linestyle="none", label=label, zorder=4, **look)
        # Families whose points coincide do not hide each other's text: below to the right, above, and higher.
        offset, aligned = (((6, -5), "left"), ((-6, 5), "right"), ((-6, 17), "right"), ((6, -17), "left"))[number % 4]
        for x, y, text in shown:
            same = [label for other, _, label in shown if abs(other - x) < 1e-9]  # of two values of lambda_1
            if text == same[0]:
                style: dict[str, Any] = {"textcoords": "offset points", "ha": aligned, "fontsize": 9}
                panel.annotate(" and ".join(same), (x, y), offset, color=look["color"], **style)
    for end in (end for line, _, end in ends if line["panel"] == "frozen"):
        panel.axhline(end, label="block 1 frozen: x = 0", **FROZEN)
    lost = [line for line in lines if line["panel"] in families and (line["factor"] <= 1e-9 or _end(line) is None)]
    if lost:
        text = "\n".join(["not in the picture, since x is not above 0 or all diverged:", *map(_fate, lost)])
        panel.text(0.995, 0.13, text, transform=panel.transAxes, ha="right", va="bottom", fontsize=9, color="0.25")
    panel.set_xscale("log")
    panel.set_xlabel(r"$x = 1 - (1 - 2\,\lambda_1\gamma_h)^{N_h}$: what block 1 gets of back-propagation's gradient")
    panel.set_ylabel("test accuracy at the end (%)")
    panel.legend(loc="upper left", fontsize=9.5, frameon=False)
    panel.margins(0.04, 0.1)
    plain_axes(panel)


def _fate(line: Line) -> str:
    end = _end(line)
    fate = "diverged" if end is None else f"{end:.0f} %"
    return rf"{line['label']}, $N_h = {line['h_steps']}$: $x = {line['factor']:.2g}$, {fate}"


def _draw_figure_3(space: Any, lines: Sequence[Line]) -> None:
    """Black is the baseline; colours are in the order of lambda_1 at equal steps; blocks that differ are dashed."""
    quantities = {
        "gluing_loss": r"gluing loss $\Vert b_1(x) - h\Vert^2$, without $\lambda_1$",
        "train_loss": "training cross entropy, at $h$ (smoothed)",
        "test_accuracy": "test accuracy (%)",
        "test_loss": "test loss",
    }
    choices = [n for n, line in enumerate(lines) if line["panel"] != "baseline"]
    equal = [n for n in choices if len(set(lines[n]["block_learning_rates"])) == 1]
    equal.sort(key=lambda n: lines[n]["penalty"])
    looks: dict[int, dict[str, Any]] = {n: {"color": one} for n, one in zip(equal, shades(len(equal)), strict=True)}
    dashed: dict[str, Any] = {"linestyle": "--", "linewidth": 2.0, "zorder": 5}
    for place, n in enumerate(n for n in choices if n not in looks):
        looks[n] = {"color": COLOURS[(1, 3, 5, 4)[place % 4]], **dashed}
    axes = space.subplots(2, 2, sharex=True)
    for panel, (quantity, title) in zip(axes.flat, quantities.items(), strict=True):
        for n, line in enumerate(lines):
            _draw_line(panel, line, quantity, "step", looks.get(n, BASELINE))
        plain_axes(panel)
        panel.set_title(title, fontsize=11)
        values = [v for line in lines if quantity in line["curves"] for v in line["curves"][quantity]["mean"]]
        if values and 0 < 30 * min(values) < max(values):
            panel.set_yscale("log")
    for panel in axes[1]:
        panel.set_xlabel("training iterations")
    space.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
