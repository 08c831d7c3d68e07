"""The picture of Theorems 1 and 2: both sides over T, and what the constants are along the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fr_jax.plotting.style import COLOURS, page, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]

SIDES: dict[str, tuple[Any, float, str]] = {
    "left": ("-", 2.4, r"measured: $\sum\gamma_t\,\mathbf{E}\Vert\nabla f(w^t)\Vert^2\,/\,\Gamma_T$"),
    "own_second_moment": (":", 1.9, r"the bound with $\mathbf{E}\Vert g^t\Vert^2$ of each $t$ in place of $M$"),
    "right": ("--", 1.6, r"the bound, (9) and (11)"),
    "proved": ("-.", 1.1, r"the bound with the proved $M$ (sine network)"),
}
TITLES = {"linear": "linear residual network", "sine": "sine residual network, not convex"}


def figure(result: Mapping[str, Any]) -> Figure:
    """A row of panels for each problem, both sides over T; then what sigma and M are the extremes of, over t.

    Args:
      result: what :func:`fr_jax.experiments.theorems.measure_all` returned.
    """
    from matplotlib.lines import Line2D

    rows, s = result["rows"], result["settings"]
    panels = {}  # title -> rows, one problem after another
    for row in rows:
        kind = f"K = {row['K']}, fixed γ" if row["schedule"] == "fixed" else "diminishing γ"
        panels.setdefault((row["problem"], kind), []).append(row)
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    columns = max(3, *(sum(problem == name for problem, _ in panels) for name in problems))
    note = (
        f"Mini-batches of {s['batch_size']} with replacement, {s['replicas']} replicas, float64. The colours of the "
        f"last row are the step sizes of the first.\n{result['machine']}, jax {result['jax']}, {result['date']}."
    )
    title = "Theorems 1 and 2 of features replay, with the constants of the problem filled in"
    drawing, space = page(4.9 * columns, 3.6 * (len(problems) + 1) + 1.3, title, note)
    axes = space.subplots(len(problems) + 1, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_visible(False)
    for number, problem in enumerate(problems):
        mine = [(kind, found) for (name, kind), found in panels.items() if name == problem]
        mine.sort(key=lambda one: one[0].startswith("dim"))
        for panel, (kind, found) in zip(axes[number], mine, strict=False):
            _draw_sides(panel, found, f"{TITLES[problem]}: {kind}")
        _share_limits([panel for panel in axes[number] if panel.get_visible()])
        axes[number, 0].set_ylabel("left and right side")
    first = [row for row in rows if row["problem"] == problems[0]]
    first = [row for row in first if row["schedule"] == "fixed"] or first
    sufficient = lambda row: np.divide(row["over_t"]["inner"], row["over_t"]["gradient"])
    name = TITLES[problems[0]].split(",")[0].removesuffix(" residual network")
    _draw_over_t(axes[-1, 0], first, sufficient, f"{name} network: how far $g^t$ descends")
    ends = {row["K"]: row["final_sigma"] for row in first if row["final_sigma"] is not None}
    for K, end in ends.items():
        axes[-1, 0].axhline(end, color="0.6", linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "top", "fontsize": 8.5, "color": "0.4"}
        axes[-1, 0].annotate(rf"$t \to \infty$, small $\gamma$, K = {K}", (0.02, end), **place)
    axes[-1, 0].set_ylabel(
        r"$\mathbf{E}\langle\nabla f(w^t), g^t\rangle\,/\,\mathbf{E}\Vert\nabla f(w^t)\Vert^2$, its least is $\sigma$"
    )
    _draw_over_t(axes[-1, 1], first, lambda row: row["over_t"]["second"], f"{name} network: how long $g^t$ is")
    axes[-1, 1].set_yscale("log")
    axes[-1, 1].set_ylabel(r"$\mathbf{E}\Vert g^t\Vert^2$, its greatest is $M$")
    climbing = lambda row: 100 * np.asarray(row["over_t"]["against"])
    _draw_over_t(axes[-1, 2], first, climbing, f"{name} network: steps expected to climb")
    axes[-1, 2].set_ylabel("% of replicas, given their past")
    shown = {name: look for name, look in SIDES.items() if any(name in row["curves"] for row in rows)}
    handles = [Line2D([], [], color="0.25", linestyle=s, linewidth=w, label=label) for s, w, label in shown.values()]
    space.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10, handlelength=3)
    return drawing


def _draw_sides(panel: Axes, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    panel.set_visible(True)
    fixed = rows[0]["schedule"] == "fixed"
    for number, row in enumerate(rows):
        colour, T = COLOURS[number % len(COLOURS)], row["curves"]["T"]
        for name, (stroke, width, _) in SIDES.items():
            if name in row["curves"]:
                values = np.asarray([np.nan if v is None else v for v in row["curves"][name]], float)
                panel.loglog(T, values, color=colour, linestyle=stroke, linewidth=width)
        start = "" if fixed else rf"$K = {row['K']}$, $\gamma_0 = {row['rate']:g}$"
        label = rf"$\gamma = {row['rate']:g}$" if fixed else start
        text = rf"{label}: $\sigma = {row['sigma']:.2f}$, bound/measured {_ratio(row['ratio'])}"
        panel.plot([], [], color=colour, linewidth=5, label=text)
    panel.set_title(title, fontsize=10.5)
    panel.set_xlabel("T, iterations")
    panel.legend(loc="lower left", fontsize=8.5, frameon=False, handlelength=1.0)
    plain_axes(panel)


def _ratio(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def _share_limits(panels: Sequence[Axes]) -> None:
    limits = [panel.get_ylim() for panel in panels]
    for panel in panels:
        low, high = min(low for low, _ in limits), max(high for _, high in limits)
        panel.set_ylim(low / 8, high)  # room for the legend


def _draw_over_t(
    panel: Axes, rows: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], Any], title: str
) -> None:
    panel.set_visible(True)
    rates = list(dict.fromkeys((row["schedule"], row["rate"]) for row in rows))
    Ks = list(dict.fromkeys(row["K"] for row in rows))
    for row in rows:
        colour = COLOURS[rates.index((row["schedule"], row["rate"])) % len(COLOURS)]
        place = Ks.index(row["K"])
        style = ("-", "--", ":", "-.")[(len(Ks) - 1 - place) % 4]
        panel.semilogx(np.asarray(row["over_t"]["t"]) + 1, values(row), color=colour, linestyle=style, linewidth=1.7)
    for place, K in enumerate(Ks):
        style = ("-", "--", ":", "-.")[(len(Ks) - 1 - place) % 4]
        panel.plot([], [], color="0.3", linestyle=style, label=f"K = {K}")
    panel.set_title(title, fontsize=10.5)
    panel.set_xlabel("t + 1, iteration")
    panel.legend(loc="best", fontsize=9, frameon=False)
    plain_axes(panel)
