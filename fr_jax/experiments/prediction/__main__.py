"""Predicts a step from measured parts, and measures it: ``python -m fr_jax.experiments.prediction --K 2``.

Every stage's functions and the transfers are timed (``stage_times``, ``step_times`` and ``data_parallel_times`` of
``fr_jax.diagnostics``), and the schedule of each method is simulated with these times; then the method
itself runs. Measurements take turns, round after round. One device is one core only where each stage is a process of
its own, on as many cores as there are stages:

    taskset -c 0,1 python -m fr_jax.launch --processes 2 -- -m fr_jax.experiments.prediction --K 2
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fr_jax as fr
from fr_jax import distributed
from fr_jax.diagnostics.profiling.stage_times import Measured, median
from fr_jax.diagnostics.simulation.timeline import occupying, resumed, simulate, summarise
from fr_jax.experiments._bench.contestants import shared_settings
from fr_jax.experiments._bench.pinned import cores_by_process
from fr_jax.experiments._bench.turns import quietly
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check_own, check_parts
from fr_jax.experiments._cli.devices import take_devices
from fr_jax.experiments._cli.machine import machine, settings_of
from fr_jax.experiments._cli.results import check_folder, write_results
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import SettingsError, check_fields, documented, setting
from fr_jax.experiments._methods import DATA_PARALLEL, METHODS
from fr_jax.experiments.prediction.methods import CHOICES, ONE, Prediction, choose, prepare, title_of
from fr_jax.plotting.gantt import gantt_figure
from fr_jax.plotting.style import png

__all__ = ["PredictionSettings", "main", "measure", "table"]

FILES = ("prediction.json", "prediction.png")


@documented
@dataclasses.dataclass(frozen=True)
class PredictionSettings:
    """Predict the seconds of a step from measured stages and transfers, and measure the step."""

    K: int = setting(2, least=1)
    """Stages."""
    methods: tuple[str, ...] = setting(
        ("fr", "ddg", "bp"),
        choices=CHOICES,
        help=f"What to predict: {', '.join(CHOICES)}; back-propagation on one device is always there. fr-lockstep: "
        "features replay by a loop that waits between plays and replays; dp: data parallelism over K devices.",
    )
    model: str = setting("resnet20", choices=tuple(fr.models.MODELS))
    """A name from fr_jax.models.MODELS."""
    batch_size: int = setting(128, least=1)
    """Examples of a mini-batch of 32x32x3 images (random numbers; only shapes matter here)."""
    microbatches: int | None = setting(None, least=1)
    """Of every method that has micro-batches. Default: each method's own, which is 1 but for gpipe."""
    rounds: int = setting(5, least=1)
    """How many times everything is measured; medians count."""
    steps: int = setting(8, least=1)
    """Steps of a method in a round."""
    cuts: tuple[int, ...] | None = None
    """Explicit cuts; by default fr_jax.balance chooses them from measured times, for features replay."""
    output: Path | None = None
    """A folder for prediction.json and prediction.png."""
    overwrite: bool = False
    """Replace these files where they exist."""


def refusal(settings: PredictionSettings) -> str | None:
    """What is wrong with the settings, or None."""
    check_fields(settings)
    shared = shared_settings(settings)
    for name in settings.methods:
        if name == DATA_PARALLEL:
            check_parts(settings.batch_size, settings.K, name)
        elif name in METHODS:
            check_own(shared, name, settings.K)
    layers = len(fr.models.MODELS[settings.model]())
    if layers < settings.K:
        return f"--K {settings.K}: {settings.model} has {layers} layers. Use at most that many."
    cuts = settings.cuts
    if cuts is not None and (len(cuts) != settings.K - 1 or [0, *cuts, layers] != sorted({0, *cuts, layers})):
        return f"--cuts {' '.join(map(str, cuts))}: give K-1 = {settings.K - 1} increasing places, 1 to {layers - 1}."
    alone = [name for name in ("bp", "dp") if name in settings.methods]
    if settings.K == 1 and alone:
        return (
            "--K 1: back-propagation on one device is always there. Use --K 2 or more, or leave "
            f"{' and '.join(alone)} out of --methods."
        )
    return None


def predicted(one: Prediction, measured: Measured, K: int, steps: int) -> float:
    """What a turn should find: devices start idle, with the features of earlier steps in their histories."""
    tasks = resumed(one.schedule(measured, K + steps), K)
    return float(simulate(occupying(tasks, measured.transfer_share)).end.max()) / steps


def measure(settings: PredictionSettings) -> tuple[dict[str, Any], bytes]:
    """Predicts and measures.

    Returns:
      What goes into prediction.json, and a PNG file with the timelines of the median times.
    """
    K, steps = settings.K, settings.steps
    shared = shared_settings(settings, balance="time")
    layers, cuts = fr.models.MODELS[settings.model](), settings.cuts or ()
    if settings.cuts is None and K > 1:
        cuts = choose(shared, layers, K)
    methods, timers = prepare(shared, layers, settings.methods, K, cuts)

    def turn(name: str, steps: int) -> float:
        contestant, took = methods[name].contestant.take_turn(steps)
        methods[name] = methods[name]._replace(contestant=contestant)
        return took.seconds

    # Stages begin to update up to K-1 steps late: only then is everything compiled, and every history full.
    for name in methods:
        turn(name, 2 * K + 1)
    found: dict[str, list[Measured]] = {name: [] for name in timers}
    rows: dict[str, dict[str, list[float]]] = {name: {"predicted": [], "measured": []} for name in methods}
    for number in range(settings.rounds):
        quietly(f"round {number + 1} of {settings.rounds}")
        for name, timer in timers.items():
            found[name].append(timer())
        for name, one in methods.items():
            rows[name]["measured"].append(turn(name, steps))
            # From this round's times: what slows the machine down for a while hits both numbers.
            rows[name]["predicted"].append(predicted(one, found[one.timer][-1], K, steps))
    parts = {name: median(all_rounds) for name, all_rounds in found.items()}
    timelines = {  # what counts of them, the second half, are whole cycles of K steps
        name: simulate(occupying(one.schedule(parts[one.timer], 8 * K), parts[one.timer].transfer_share))
        for name, one in methods.items()
    }
    baseline = statistics.median(rows[ONE]["measured"])
    result = {
        "settings": settings_of(settings),
        "cuts": list(cuts),
        "processes": distributed.group().size,
        "cores_by_process": cores_by_process(),
        **machine(),
        "results": {name: _summary(row, summarise(timelines[name])) for name, row in rows.items()},
        "parts": {name: _as_json(measured) for name, measured in parts.items()},
        "transfer_compute_ratio": {
            name: statistics.fmean(measured.times.features) / baseline
            for name, measured in parts.items()
            if measured.times.features
        },
    }
    title = f"{settings.model}, batch {settings.batch_size}, K = {K}, simulated with measured times"
    charts = {title_of(name, shared): timeline for name, timeline in timelines.items()}
    one_step = summarise(timelines[ONE]).step_seconds
    return result, png(gantt_figure(charts, title=title, seconds=4 * one_step, reference=one_step), dpi=130)


def _summary(row: dict[str, list[float]], steady: Any) -> dict[str, Any]:
    guess, seen = statistics.median(row["predicted"]), statistics.median(row["measured"])
    return {
        "predicted_seconds": guess,
        "measured_seconds": seen,
        "predicted_over_measured": guess / seen,
        "predicted_steady_seconds": steady.step_seconds,
        "predicted_bubble": steady.bubble,
        "rounds": row,
    }


def _as_json(measured: Measured) -> dict[str, Any]:
    modules = [{k: v for k, v in one._asdict().items() if v == v} for one in measured.times.stages]  # without NaN
    features = list(measured.times.features)
    # "modules" for stages: the name in the files of earlier measurements.
    found = {"modules": modules, "transfer_seconds": features, "transfer_share": measured.transfer_share}
    return found | ({"all_reduce_seconds": all_reduce} if (all_reduce := measured.times.all_reduce) else {})


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    own = result["settings"]
    body = [
        (
            name,
            *(f"{row[which]:.4f}" for which in ("predicted_seconds", "measured_seconds")),
            f"{row['predicted_over_measured']:.3f}",
            f"{row['predicted_bubble']:.1%}",
        )
        for name, row in result["results"].items()
    ]
    lines = [
        f"{own['model']}, batch {own['batch_size']}, K = {own['K']}, cuts {result['cuts']}, {result['processes']} "
        "process(es)",
        text_table(("", "predicted s", "measured s", "ratio", "bubble"), body),
    ]
    for name, ratio in result["transfer_compute_ratio"].items():
        share = result["parts"][name]["transfer_share"]
        lines.append(f"transfer/compute ratio ({name}): {ratio:.4f}; a transfer keeps each core busy for {share:.0%}")
    for name, parts in result["parts"].items():
        if "all_reduce_seconds" in parts:
            lines.append(f"all-reduces ({name}): {parts['all_reduce_seconds']:.4f} s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments."""
    return harness.main("prediction", PredictionSettings(), run, arguments)


def run(settings: PredictionSettings) -> int:
    """Predicts and measures, prints the table and writes the files; returns the exit code.

    Raises:
      SettingsError: a setting cannot be used, or there are fewer devices than stages.
      GroupError: the processes of a run of several do not find each other, or one of them failed.
    """
    if problem := refusal(settings):
        raise SettingsError(problem)
    check_folder(settings.output, FILES, overwrite=settings.overwrite)
    distributed.initialize()
    take_devices(settings.K, each=True)
    try:
        result, picture = measure(settings)
    except ValueError as error:  # of the library, whose messages fit the flags
        raise SettingsError(str(error)) from error
    if not distributed.is_first():
        return 0
    print(table(result), flush=True)
    if settings.output is not None:
        return write_results(settings.output, dict(zip(FILES, (result, picture), strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
