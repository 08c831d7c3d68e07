"""Multiplications of the naive chain rule and of back-propagation: ``python -m fr_jax.experiments.chain_rule``.

Both compute ∂ŷ/∂w for every weight of a network, one example, after the same forward pass; the counts are of what was
carried out (``fr_jax.reference``). Three ways to grow: the lecture's one-dimensional chain in depth, a ReLU network in
depth, and one in width.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine, settings_of
from fr_jax.experiments._cli.results import check_folder, write_results
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import check_fields, setting
from fr_jax.plotting.style import COLOURS, page, plain_axes, png
from fr_jax.reference import backpropagation, chain_rule, network
from fr_jax.reference.counting import Multiplications

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ChainRuleSettings", "figure", "main", "measure", "table"]

FILES = ("counts.json", "counts.png")
METHODS: dict[str, Callable[[network.Params, network.Trace, Multiplications | None], network.Params]] = {
    "naive": chain_rule.output_gradients,
    "backpropagation": backpropagation.output_gradients,
}
STYLES = {
    "naive": ("naive chain rule, weight by weight", COLOURS[1], "s"),
    "backpropagation": ("back-propagation, matrix form", COLOURS[0], "o"),
}


@dataclasses.dataclass(frozen=True)
class ChainRuleSettings:
    """Count and time the naive chain rule and back-propagation over growing networks."""

    chain: tuple[int, ...] = setting((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), least=1, series="increasing")
    """Numbers of weights T of the lecture's chain a w_T ... w_1 x: one node a layer, no ReLU."""
    depths: tuple[int, ...] = setting((1, 2, 4, 8, 16, 32, 64, 128), least=1, series="increasing")
    """Numbers of weight matrices of the ReLU network that grows in depth."""
    width: int = setting(8, least=1)
    """Nodes a layer of the network that grows in depth."""
    widths: tuple[int, ...] = setting((2, 4, 8, 16, 32, 64, 128), least=1, series="increasing")
    """Nodes a layer of the ReLU network that grows in width."""
    depth: int = setting(4, least=1)
    """Weight matrices of the network that grows in width."""
    repeats: int = setting(3, least=1)
    """How often each computation is timed, in seconds of this process on the CPU; the fastest counts."""
    seed: int = setting(0, least=0)
    """Seed of weights and inputs."""
    output: Path | None = None
    """A folder for counts.json and counts.png; without it only the table is printed."""
    overwrite: bool = False
    """Replace these files where they exist."""


def measure(settings: ChainRuleSettings) -> dict[str, Any]:
    """Multiplications and CPU seconds of both ways, for every size.

    Returns:
      Machine, date and versions, and under ``"growth"`` one entry a way to grow: ``title``, ``rows`` (``size``,
      ``edges``, ``nodes``, ``forward``, and by method ``multiplications`` and ``seconds``), ``slopes`` of the logarithm
      of either over the logarithm of E + V, fitted to the upper half of the sizes.
    """
    rng = np.random.default_rng(settings.seed)
    repeats = settings.repeats
    chains = [(T, network.chain(rng.uniform(0.9, 1.1, T), 1.0)) for T in settings.chain]
    deep = [(n, network.init(rng, [settings.width] * (n + 1))) for n in settings.depths]
    wide = [(n, network.init(rng, [n] * (settings.depth + 1))) for n in settings.widths]
    growth = {
        "chain": ("the lecture's chain, depth grows", "T", chains, network.IDENTITY),
        "depth": (f"ReLU network, {settings.width} nodes a layer, depth grows", "matrices", deep, network.RELU),
        "width": (f"ReLU network, {settings.depth} matrices, width grows", "nodes a layer", wide, network.RELU),
    }
    entries = {}
    for name, (title, unit, networks, activation) in growth.items():
        rows = [{"size": n, **_row(params, activation, rng, repeats)} for n, params in networks]
        entries[name] = {"title": title, "size_is": unit, "rows": rows, "slopes": _slopes(rows)}
    return {
        "settings": settings_of(settings),
        **machine("numpy"),
        "growth": entries,
    }


def _row(
    params: network.Params, activation: network.Activation, rng: np.random.Generator, repeats: int
) -> dict[str, Any]:
    forward = Multiplications()
    x = rng.standard_normal((*params.weights, params.alpha[None])[0].shape[1])
    trace = network.forward(params, x, activation, forward)
    edges, nodes = network.size(params)
    row: dict[str, Any] = {"edges": edges, "nodes": nodes, "forward": forward.count}
    for name, output_gradients in METHODS.items():
        seconds, counter = [], Multiplications()
        for _ in range(repeats):
            counter, start = Multiplications(), time.process_time()
            output_gradients(params, trace, counter)
            seconds.append(time.process_time() - start)
        row[name] = {"multiplications": counter.count, "seconds": min(seconds)}
    return row


def _slopes(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    upper = rows[-max(2, (len(rows) + 1) // 2) :]
    sizes = [row["edges"] + row["nodes"] for row in upper]

    def slope(name: str, quantity: str) -> float | None:
        values = [row[name][quantity] for row in upper]
        return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if len(upper) > 1 else None

    return {name: {what: slope(name, what) for what in ("multiplications", "seconds")} for name in METHODS}


def table(result: dict[str, Any]) -> str:
    """The result as text.

    Example:
      >>> result = measure(ChainRuleSettings(chain=(1, 3), depths=(1,), widths=(1,), repeats=1))
      >>> [line.split()[:6] for line in table(result).splitlines()[2:4]]
      [['1', '2', '3', '2', '1', '1'], ['3', '4', '5', '4', '6', '5']]
    """
    parts = []
    for entry in result["growth"].values():
        head = (entry["size_is"], "E", "V", "forward", "naive", "back-prop.", "ratio", "naive s", "back-prop. s")
        body = []
        for row in entry["rows"]:
            naive, matrix_form = (row[name] for name in METHODS)
            counts = [one["multiplications"] for one in (naive, matrix_form)]
            seconds = [f"{one['seconds']:.6f}" for one in (naive, matrix_form)]
            sizes = [row[name] for name in ("size", "edges", "nodes", "forward")]
            body.append((*sizes, *(f"{count:,}" for count in counts), f"{counts[0] / counts[1]:.1f}", *seconds))
        slopes = [entry["slopes"][name][what] for what in ("multiplications", "seconds") for name in METHODS]
        texts = ["-" if slope is None else f"{slope:.2f}" for slope in slopes]
        label = "slopes over E+V, upper half of the sizes (naive, back-prop., naive s, back-prop. s)"
        parts.append(f"{entry['title']}\n{text_table(head, body, left=0)}\n{label}: {' '.join(texts)}\n")
    return "\n".join(parts)


def figure(result: dict[str, Any]) -> Figure:
    """Multiplications (above) and CPU seconds (below) over E + V, both axes logarithmic, one column a way to grow.

    Args:
      result: what :func:`measure` returned.
    """
    from matplotlib.lines import Line2D

    title = "Every ∂ŷ/∂w of a network: the chain rule afresh for each weight, and back-propagation"
    note = (
        "One example, after the forward pass; slopes fitted to the upper half of the sizes. Seconds include the "
        f"overhead of each call of NumPy. {result['machine']}, {result['date']}."
    )
    drawing, space = page(12.5, 7.4, title, note)
    axes = space.subplots(2, 3, sharex="col", sharey="row")
    for column, entry in enumerate(result["growth"].values()):
        axes[0, column].set_title(entry["title"], fontsize=10.5)
        for panel, quantity in zip(axes[:, column], ("multiplications", "seconds"), strict=True):
            _draw(panel, entry, quantity)
        axes[1, column].set_xlabel("size of the graph: edges + nodes")
    for panel, quantity in zip(axes[:, 0], ("multiplications", "seconds"), strict=True):
        rows = [row for entry in result["growth"].values() for row in entry["rows"]]
        values = [row[name][quantity] for row in rows for name in METHODS]
        panel.set_ylim(min(values) / 2.5, max(values) * 12)
        panel.set_ylabel(quantity if quantity == "multiplications" else "CPU seconds")
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, label=label)
        for label, colour, marker in STYLES.values()
    ]
    handles.append(Line2D([], [], color="0.45", linestyle="--", linewidth=1.2, label="slopes 2 and 1 exactly"))
    space.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return drawing


def _draw(panel: Axes, entry: dict[str, Any], quantity: str) -> None:
    sizes = np.array([row["edges"] + row["nodes"] for row in entry["rows"]], float)
    for (name, (_, colour, marker)), power in zip(STYLES.items(), (2, 1), strict=True):
        values = [row[name][quantity] for row in entry["rows"]]
        panel.loglog(sizes, values, color=colour, marker=marker, markersize=5, linewidth=2)
        guide = values[-1] * (sizes / sizes[-1]) ** power
        panel.loglog(sizes, guide, color="0.45", linestyle="--", linewidth=1.2, zorder=1)
        slope = entry["slopes"][name][quantity]
        if slope is not None:
            at, offset = (sizes[-1], values[-1]), (-8, 2) if power == 2 else (-2, 8)
            style = {"ha": "right", "va": "bottom", "fontsize": 10, "color": colour, "textcoords": "offset points"}
            panel.annotate(f"slope {slope:.2f}", at, offset, **style)
    plain_axes(panel)
    panel.margins(0.06)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments."""
    return harness.main("chain_rule", ChainRuleSettings(), run, arguments)


def run(settings: ChainRuleSettings) -> int:
    """Counts, prints the table and writes the files; returns the exit code.

    Raises:
      SettingsError: a setting cannot be used.
    """
    check_fields(settings)
    one_process("chain_rule counts in one process.")
    check_folder(settings.output, FILES, overwrite=settings.overwrite)
    result = measure(settings)
    print(table(result), flush=True)
    if settings.output is not None:
        return write_results(settings.output, dict(zip(FILES, (result, png(figure(result))), strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
