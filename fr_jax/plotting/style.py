"""What all pictures share: colours, the page with its title and note, the look of a panel."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["COLOURS", "page", "plain_axes", "png", "set_log_scale", "shades"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow is left out, too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CHARACTERS = 14.5  # of a note in an inch


def page(width: float, height: float, title: str, note: str) -> tuple[Figure, SubFigure]:
    """A figure of that size in inches, and the space between its title and its note for the panels; without pyplot.

    A legend of the whole figure is ``space.legend(loc="outside upper center")``.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    drawing.suptitle(title, fontsize=13, fontweight="bold")
    drawing.supxlabel(textwrap.fill(note, int(CHARACTERS * width)), fontsize=8.5, color="0.35")
    # Without a figure of their own, panels and legend would share the margin with the title, and overlap it.
    space: Any = drawing.subfigures(1, 1)
    return drawing, space


def plain_axes(panel: Axes, axis: Literal["both", "x", "y"] = "both", **grid: Any) -> None:
    """A pale grid behind what is drawn, and no frame above and on the right."""
    panel.grid(True, axis=axis, color="0.9", linewidth=0.8, **grid)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def set_log_scale(panel: Axes, low: float, high: float) -> bool:
    """A logarithmic y axis if positive values reach over a factor of 30; whether it was set."""
    if not 0 < low < high / 30:
        return False
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    return True


def shades(number: int) -> list[Any]:
    """Colours from dark to light, for values that have an order."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.9 * i / max(number - 1, 1)) for i in range(number)]


def png(drawing: Figure, dpi: int = 150) -> bytes:
    """A figure as the content of a PNG file."""
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()
