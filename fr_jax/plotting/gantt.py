"""Gantt charts of timelines: one row per device, one colour per kind of work, and the bubble in per cent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fr_jax.diagnostics.simulation.timeline import Task, Timeline, summarise
from fr_jax.plotting.style import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LOOKS", "Look", "gantt_figure"]


class Look(NamedTuple):
    """How the kinds of work in ``kinds`` are drawn; ``ink`` is the colour of the number on them."""

    label: str
    colour: str
    kinds: tuple[str, ...]
    ink: str = "black"


# Okabe and Ito's colours, told apart by colour-blind readers.
LOOKS = (
    Look("forward, play", "#56B4E9", ("play", "forward")),
    Look("replay, backward and update in one", "#E69F00", ("replay",)),
    Look("forward and backward in one", "#0072B2", ("last", "gradient"), "white"),
    Look("backward", "#009E73", ("backward",), "white"),
    Look("update", "#F0E442", ("update",)),
    Look("synthesizer", "#CC79A7", ("synthesize", "learn")),
    Look("transfer", "#D55E00", ("transfer",), "white"),
)
OTHER = Look("other work", "#999999", ())
LOOK_OF = {kind: look for look in LOOKS for kind in look.kinds}

# Numbers of devices, and of bars per device, up to which a chart shows mini-batch numbers and single transfers.
DEVICES_WITH_ROOM, BARS_WITH_ROOM = 12, 150
WIDTH_INCHES, MARGIN_INCHES = 13.0, 0.9
POINTS_PER_DIGIT = 4.6


def gantt_figure(
    timelines: Mapping[str, Timeline],
    *,
    title: str,
    seconds: float | None = None,
    unit: str = "s",
    reference: float | None = None,
) -> Figure:
    """One chart per timeline, on a common time axis.

    The title of each chart gives the seconds per step and the bubble in steady state (:func:`summarise`); the chart
    itself also shows how the pipeline fills. Numbers on the bars are mini-batches, or micro-batches of GPipe. Kinds of
    tasks that are not in :data:`LOOKS` are grey.

    Args:
      timelines: by label, each of at least two steps.
      title: one line above the figure.
      seconds: the end of the time axis; by default the end of the shortest timeline.
      unit: the unit of the times.
      reference: the time of a step of back-propagation on one device, to state the speed of each timeline.

    Raises:
      ValueError: there is no timeline, or one without a steady state.

    Example:
      >>> from fr_jax.diagnostics.simulation.schedules import ddg
      >>> from fr_jax.diagnostics.simulation.timeline import simulate
      >>> from fr_jax.diagnostics.simulation.times import times_of_costs
      >>> drawing = gantt_figure({"DDG": simulate(ddg(times_of_costs([1.5, 1.5]), steps=8))}, title="K = 2")
      >>> drawing.axes[0].get_title(loc="left")
      'DDG: 1.5 s per step, bubble 0.0 %'
    """
    if not timelines:
        raise ValueError("no timelines to draw: give at least one, with its label.")
    from matplotlib.patches import Patch

    end = min(float(timeline.end.max()) for timeline in timelines.values()) if seconds is None else seconds
    rows = [1 + max(task.device for task in timeline.schedule) for timeline in timelines.values()]
    heights = [max(0.35, min(0.24 * devices, 0.7 + 0.1 * devices, 2.2)) for devices in rows]
    drawing, space = page(WIDTH_INCHES, sum(heights) + 0.42 * len(rows) + 1.25, title, "")
    panels = space.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    shown: set[str] = set()
    for axes, (label, timeline) in zip(panels, timelines.items(), strict=True):
        shown |= _draw(axes, timeline, end)
        found = summarise(timeline)
        faster = f", {reference / found.step_seconds:.2f} times as fast as one device" if reference else ""
        summary = f"{found.step_seconds:.4g} {unit} per step{faster}, bubble {100 * found.bubble:.1f} %"
        axes.set_title(f"{label}: {summary}", loc="left", fontsize=10, pad=3)
    panels[-1].set_xlabel(f"time ({unit})")
    handles = [Patch(color=look.colour, label=look.label) for look in (*LOOKS, OTHER) if look.label in shown]
    space.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return drawing


def _draw(axes: Axes, timeline: Timeline, end: float) -> set[str]:
    """Draws a timeline, and returns the labels of the looks that it needs."""
    devices = 1 + max(task.device for task in timeline.schedule)
    bars = zip(timeline.schedule, timeline.start.tolist(), timeline.end.tolist(), strict=True)
    visible = [(task, start, stop) for task, start, stop in bars if start < end and stop > start]
    few = devices <= DEVICES_WITH_ROOM and len(visible) <= BARS_WITH_ROOM * devices
    shown = set()
    for look in (*LOOKS, OTHER):
        bars = [(task, start, stop) for task, start, stop in visible if LOOK_OF.get(task.kind, OTHER) is look]
        if bars:
            shown.add(look.label)
            _draw_bars(axes, look, bars, few)
    if few:
        points_per_unit = 72 * (WIDTH_INCHES - MARGIN_INCHES) / end
        _draw_numbers(axes, visible, end, points_per_unit)
        lines = [one for one in timeline.transfers if one.start < end]
        for one in lines:
            axes.plot((one.start, one.end), (one.source, one.target), color=LOOKS[-1].colour, linewidth=0.8, zorder=3)
        shown |= {LOOKS[-1].label} if lines else set()
    _finish(axes, devices, end)
    return shown


def _draw_bars(axes: Axes, look: Look, bars: Sequence[tuple[Task, float, float]], few: bool) -> None:
    from matplotlib.collections import PolyCollection

    half = 0.42 if few else 0.5
    corners = []
    for task, start, stop in bars:
        low, high = task.device - half, task.device + half
        corners.append(np.array([[start, low], [stop, low], [stop, high], [start, high]]))
    # Antialiased edges of thousands of bars side by side would show as pale lines between them.
    edge: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.6} if few else {"antialiased": False}
    axes.add_collection(PolyCollection(corners, facecolors=look.colour, **edge))


def _draw_numbers(axes: Axes, bars: Sequence[tuple[Task, float, float]], end: float, points_per_unit: float) -> None:
    for task, start, stop in bars:
        text = str(task.minibatch)
        fits = stop <= end and (stop - start) * points_per_unit > POINTS_PER_DIGIT * len(text) + 3
        if fits and task.kind != "transfer":
            style = {"ha": "center", "va": "center_baseline", "fontsize": 7.5}
            axes.text((start + stop) / 2, task.device, text, color=LOOK_OF.get(task.kind, OTHER).ink, **style)


def _finish(axes: Axes, devices: int, end: float) -> None:
    axes.set_xlim(0, end)
    axes.set_ylim(devices - 0.4, -0.6)  # device 1 on top
    every = 1 if devices <= DEVICES_WITH_ROOM else max(1, devices // 8)
    ticks = [k for k in range(devices) if (k + 1) % every == 0 or k == 0]
    axes.set_yticks(ticks, [str(k + 1) for k in ticks], fontsize=8)
    axes.set_ylabel("device", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("0.93")
    axes.spines[["top", "right", "left"]].set_visible(False)
