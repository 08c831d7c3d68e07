"""Simulated speedup against the number of devices and against slow links: ``python -m fr_jax.experiments.scaling``.

Nothing is trained. The schedules that the methods issue are simulated with the costs of a network's layers, cut by
``fr_jax.balance``, and with those of an ideal network, which can be cut anywhere; beside them stand the closed forms.
The unit of time is the forward pass of the whole network, so back-propagation on one device takes 3 a step.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fr_jax.diagnostics.simulation.timeline import Timeline, simulate
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine, settings_of
from fr_jax.experiments._cli.results import check_folder, write_results
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._models import MODEL_CARDS, example_inputs
from fr_jax.experiments.scaling import picture as scaling_picture
from fr_jax.experiments.scaling.network import COMPARED, STEP, Network, described, ideal, own_of, schedule, speedups
from fr_jax.models import MODELS
from fr_jax.plotting.gantt import gantt_figure
from fr_jax.plotting.style import png

__all__ = ["ScalingSettings", "main", "simulated", "table"]


@dataclasses.dataclass(frozen=True)
class ScalingSettings:
    """Simulate how fast each method is on many devices, from the costs of a network's layers."""

    K: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of devices: stages, or data-parallel devices."""
    model: str = "resnet110"
    """A name from fr_jax.models.MODELS."""
    depth: int | None = None
    """Layers of --model mlp."""
    width: int | None = None
    """Width of --model mlp."""
    batch_size: int = 128
    """Examples of a mini-batch of 32x32x3 images."""
    costs: Literal["flops", "time"] = "flops"
    """What layers cost: operations counted by XLA, or times measured on this machine."""
    microbatches: int = 32
    """Of GPipe."""
    ratio: float = 0.0
    """Transfer/compute ratio while K varies, and in the timelines: the seconds in which the features of a mini-batch
    cross a cut (the mean over all places to cut), over those of a step of back-propagation on one device."""
    ratios: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Transfer/compute ratios to go through."""
    ratio_K: int = 8
    """Number of devices while the ratio varies."""
    timelines: tuple[int, ...] = (4, 64)
    """Numbers of devices to draw timelines for."""
    output: Path | None = None
    """A folder for scaling.json, scaling.png and timeline-*.png; without it only the tables are printed."""
    overwrite: bool = False
    """Replace these files where they exist."""


def refusal(settings: ScalingSettings) -> str | None:
    """What is wrong with the settings, or None."""
    if settings.model not in MODELS:
        return f"--model {settings.model} is unknown; it can be {', '.join(MODELS)}."
    for name in ("depth", "width"):
        if getattr(settings, name) is not None and settings.model not in MODEL_CARDS:
            having = " and ".join(MODEL_CARDS)
            return f"--{name} is a setting of --model {having}, not of {settings.model}. Drop the flag."
    for name in ("K", "timelines"):
        numbers = getattr(settings, name)
        if (name == "K" and not numbers) or any(K < 1 for K in numbers) or list(numbers) != sorted(set(numbers)):
            return f"--{name} {' '.join(map(str, numbers))}: give increasing whole numbers, each 1 or more."
    for name in ("depth", "width", "batch_size", "microbatches", "ratio_K"):
        if (value := getattr(settings, name)) is not None and value < 1:
            return f"--{name.replace('_', '-')} {value}: give 1 or more."
    if settings.depth == 1:
        return "--depth 1 leaves nothing to cut; give 2 or more."
    if not settings.ratios or not all(0 < ratio < math.inf for ratio in settings.ratios):
        return f"--ratios {' '.join(map(str, settings.ratios))}: give one or more finite numbers above 0."
    return None if 0 <= settings.ratio < math.inf else f"--ratio {settings.ratio}: give a finite number, 0 or more."


def output_files(settings: ScalingSettings) -> list[str]:
    """What the program may write, by name."""
    charts = [f"timeline-K{K}{of}.png" for K in settings.timelines for of in ("", f"-{settings.model}")]
    return ["scaling.json", "scaling.png", *charts]


def make_network(settings: ScalingSettings) -> Network:
    """The network, with the costs of its layers."""
    own = {name: getattr(settings, name) for name in ("depth", "width") if getattr(settings, name) is not None}
    layers = MODELS[settings.model](**own)
    inputs = example_inputs(settings.model, settings.batch_size)
    return described(layers, inputs, settings.costs)


def simulated(settings: ScalingSettings, network: Network) -> dict[str, Any]:
    """All speedups over back-propagation on one device.

    Returns:
      Settings and versions, what is known of the network, and two lists of rows: ``by_K`` (``K``, the closed forms
      ``bounds`` without transfers, ``ideal``, ``model``: speedups by method; ``cuts`` of features replay) and
      ``by_ratio`` (``ratio``, ``ideal``, ``model``). ``model`` is None where K exceeds the number of layers.
    """
    M = settings.microbatches
    # The same weights: data parallelism's all-reduce takes as long in both.
    perfect = ideal(network.weights)
    by_K, by_ratio = [], []
    for K in settings.K:
        weight = COMPARED["fr"].last_stage_weight(K, {})
        bounds = {name: card.speedup(K, own_of(name, M)) for name, card in COMPARED.items()}
        found = [speedups(one, K, settings.ratio, M) for one in (perfect, network)]
        by_K.append({"K": K, "bounds": bounds, "ideal": found[0], "model": found[1], "cuts": network.cuts(K, weight)})
    for ratio in sorted(settings.ratios):
        found = [speedups(one, settings.ratio_K, ratio, M) for one in (perfect, network)]
        by_ratio.append({"ratio": ratio, "ideal": found[0], "model": found[1]})
    return {
        "settings": settings_of(settings, "timelines"),
        "layers": len(network.costs),
        "layer_shares": [cost / STEP for cost in network.costs],
        "mean_feature_bytes": network.mean_feature_bytes,
        "weight_bytes_over_mean_feature_bytes": network.weights,
        **machine(),
        "by_K": by_K,
        "by_ratio": by_ratio,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    own = result["settings"]
    parts = [f"Speedup over back-propagation on one device, simulated; GPipe with {own['microbatches']} micro-batches."]
    titles = {"bounds": "closed forms", "ideal": "ideal network", "model": f"{own['model']}, by {own['costs']}"}
    for which, title in titles.items():
        transfers = "" if which == "bounds" else f", transfer/compute ratio {own['ratio']:g}"
        parts.append(f"{title}{transfers}\n{_speedups('K', result['by_K'], which)}")
    for which in ("ideal", "model"):
        parts.append(f"{titles[which]}, K = {own['ratio_K']}\n{_speedups('ratio', result['by_ratio'], which)}")
    if any(row["model"] is None for row in (*result["by_K"], *result["by_ratio"])):
        parts.append(f"-: {own['model']} has {result['layers']} layers, and cannot be cut into more stages.")
    return "\n\n".join(parts)


def _speedups(first: str, rows: list[dict[str, Any]], which: str) -> str:
    known = lambda row, name: row[which] is not None and row[which][name] is not None
    cell = lambda row, name: f"{row[which][name]:.2f}" if known(row, name) else "-"
    body = [(f"{row[first]:g}", *(cell(row, name) for name in COMPARED)) for row in rows]
    return text_table((first, *(card.short for card in COMPARED.values())), body, left=0)


def timelines(settings: ScalingSettings, network: Network, K: int) -> tuple[dict[str, Timeline], float]:
    """The timeline of every method, by title, and how far to draw them."""
    # With many devices a step is short: less time shows as many steps.
    until = 3 * STEP if K <= 8 else 1.5 * STEP
    made = {}
    for name, card in COMPARED.items():
        own = own_of(name, settings.microbatches)
        # Enough steps to fill the chart if the method reaches its bound, and a few more.
        fastest = STEP / max(1.0, card.speedup(K, own) or K)
        steps = 4 + math.ceil(until / fastest)
        if card.decoupled:  # half of them, which the chart's title is about, are whole cycles of K steps
            steps = 2 * K * math.ceil((steps + 2 * K) / (2 * K))
        made[card.titled(own)] = simulate(schedule(name, network, K, settings.ratio, settings.microbatches, steps))
    return made, until


def pictures(settings: ScalingSettings, network: Network, result: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by name."""
    drawn = {"scaling.png": scaling_picture.figure(result)}
    networks = {"": ("an ideal network", ideal(network.weights)), f"-{settings.model}": (settings.model, network)}
    for K in settings.timelines:
        for suffix, (title, one) in networks.items():
            if one.fits(K):
                charts, until = timelines(settings, one, K)
                title = f"{title} on {K} devices, transfer/compute ratio {settings.ratio:g} (simulated)"
                options = {"seconds": until, "unit": "forward passes", "reference": STEP}
                drawn[f"timeline-K{K}{suffix}.png"] = gantt_figure(charts, title=title, **options)
    return {name: png(drawing, dpi=150 if name == "scaling.png" else 110) for name, drawing in drawn.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments."""
    return harness.main("scaling", ScalingSettings(), run, arguments)


def run(settings: ScalingSettings) -> int:
    """Simulates, prints the table and writes the files; returns the exit code.

    Raises:
      SettingsError: a setting cannot be used.
    """
    if problem := refusal(settings):
        raise SettingsError(problem)
    one_process("scaling simulates in one process.")
    check_folder(settings.output, output_files(settings), overwrite=settings.overwrite)
    network = make_network(settings)
    result = simulated(settings, network)
    print(table(result), flush=True)
    if settings.output is not None:
        return write_results(settings.output, {"scaling.json": result, **pictures(settings, network, result)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
