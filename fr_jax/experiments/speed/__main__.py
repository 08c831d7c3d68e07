"""Times one step of each method, side by side: ``python -m fr_jax.experiments.speed --K 2 --pinned``.

Contestants take turns, round after round, so that a slow minute of the machine hits all of them; medians and ratios
are reported, the bound beside each. With ``--pinned`` each stage is a process of its own on a core of its own, the only
way to make one CPU device one core; without it all stages are devices of this process. What the host spends to issue a
step, and what it takes to send a feature, are measured by themselves.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import fr_jax as fr
from fr_jax.diagnostics.profiling.stage_times import Measured, median, stage_timer
from fr_jax.distributed import is_first
from fr_jax.experiments._bench.contestants import (
    BASELINE,
    OPTIMIZERS,
    Entry,
    make_batch,
    make_entry,
    method_settings,
    plain,
    shared_costs,
    shared_settings,
)
from fr_jax.experiments._bench.pinned import placed_on, start_pinned
from fr_jax.experiments._bench.turns import as_rows, in_turns, quietly
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check_cuts, check_own, check_parts, check_shared
from fr_jax.experiments._cli.devices import take_devices
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine
from fr_jax.experiments._cli.per_method import MICROBATCHES_HELP, numbers_of_microbatches
from fr_jax.experiments._cli.results import check_file, write_beside
from fr_jax.experiments._cli.settings import ModelSettings, SharedSettings, own_of_model
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import SettingsError, check_fields, documented, setting
from fr_jax.experiments._methods import DATA_PARALLEL, METHODS, VARIANTS, listed
from fr_jax.experiments._models import example_inputs, random_batch
from fr_jax.experiments.speed.picture import speed_figure
from fr_jax.plotting.style import png
from fr_jax.training.classification import cross_entropy
from fr_jax.types import Stage

__all__ = ["SpeedSettings", "main", "run"]

HOPS = 20  # there and back in one measurement: a single crossing is too short to time
TRANSFER_ROUNDS = 3


@documented
@dataclasses.dataclass(frozen=True)
class OptionSettings:
    """Those that belong to no model."""

    K: int = setting(2, least=1)
    """Stages, and devices of data parallelism."""
    methods: tuple[str, ...] = setting(
        ("bp", "fr", "ddg", "gpipe", DATA_PARALLEL),
        choices=(*METHODS, *VARIANTS, DATA_PARALLEL),
        help=f"Those to time on K devices: {listed()}; fr-stashed (features replay at stashed weights), 1f1b (gpipe "
        "with that schedule), and dp (data parallelism).",
    )
    model: str = setting("resnet20", choices=tuple(fr.models.MODELS))
    """A name from fr_jax.models.MODELS."""
    batch_size: int = setting(128, least=1)
    """Examples of a mini-batch of 32x32x3 images, or of windows of text (random; only shapes matter here)."""
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Of the computation: float32 or bfloat16."""
    optimizer: str = setting("sgd", choices=tuple(OPTIMIZERS))
    """sgd (with momentum), adamw, nadam or muon, at a constant rate: its update is a part of the step."""
    microbatches: tuple[str, ...] | None = setting(None, help=MICROBATCHES_HELP)
    rounds: int = setting(9, least=1)
    """How many times each contestant has its turn."""
    steps: int = setting(8, least=1)
    """Steps of a turn."""
    balance: str = setting("time", choices=("time", "flops", "uniform"))
    """How each method's cuts are chosen: time (measured first), flops, or uniform."""
    cuts: tuple[int, ...] | None = None
    """Explicit cuts, for all methods alike."""
    pinned: bool = False
    """One process a stage, each pinned to one core."""
    output: Path | None = None
    """A JSON file for the numbers; the picture gets its name with .png."""
    overwrite: bool = False
    """Replace these files where they exist."""


@documented
@dataclasses.dataclass(frozen=True)
class SpeedSettings(ModelSettings, OptionSettings):
    """Time one training step of every method, side by side.

    A plain jitted optax step, back-propagation on one device and features replay with K = 1 are always among them.
    """


def check(settings: SpeedSettings) -> None:
    """Raises SettingsError for the first setting that cannot be used."""
    check_shared(shared_settings(settings, microbatches=None), ())
    check_fields(settings)
    check_cuts(settings.cuts, settings.K)
    if settings.K == 1 and settings.methods != SpeedSettings().methods and {*settings.methods} - {"bp", "fr"}:
        raise SettingsError(
            f"--K 1 --methods {' '.join(settings.methods)}: with one stage every method is back-propagation, which is "
            "timed anyway. Use --K 2 or more, or drop --methods."
        )
    for method, shared in timed(settings):
        if method == DATA_PARALLEL:
            check_parts(settings.batch_size, settings.K, method)
        else:
            check_own(shared, method, settings.K)
    if not settings.pinned:
        one_process("speed without --pinned measures in one process.")
    check_file(settings.output, overwrite=settings.overwrite)


def timed(settings: SpeedSettings) -> list[tuple[str, SharedSettings]]:
    """What is timed on K devices: methods with the settings of a run, one for each number of micro-batches."""
    names = tuple(dict.fromkeys(settings.methods))
    numbers = numbers_of_microbatches(settings.microbatches, names)
    each = []
    for name in names:
        method, own = VARIANTS.get(name, (name, {}))
        each += [(method, shared_settings(settings, microbatches=M, **own)) for M in numbers.get(name, (None,))]
    return each if settings.K > 1 else []


def make_entries(settings: SpeedSettings, layers: Sequence[Stage]) -> list[Entry]:
    """All contestants, in the order of the table."""
    common = shared_settings(settings, microbatches=None)
    context = own_of_model(common).get("context")
    example = example_inputs(settings.model, settings.batch_size, context)
    batch = make_batch(settings.model, settings.batch_size, fr.placement(1)[0], context)
    entries = [
        plain(layers, batch, OPTIMIZERS[settings.optimizer]),
        make_entry(common, layers, "bp", 1, name=BASELINE),
        make_entry(common, layers, "fr", 1),
    ]
    # The layers are timed once for all methods, except those with networks of their own at the cuts.
    costs = None
    if settings.cuts is None and settings.balance != "uniform" and settings.K > 1:
        quietly(f"costs of the layers: {settings.balance}")
        costs = shared_costs(method_settings(common, "bp", settings.K, None), layers, example)
    for method, shared in timed(settings):
        known = costs if method == DATA_PARALLEL or METHODS[method].at_cut is None else None
        entries.append(make_entry(shared, layers, method, settings.K, cuts=settings.cuts, costs=known))
    return entries


def measure_transfers(settings: SpeedSettings, layers: Sequence[Stage], cuts: Sequence[int]) -> list[dict[str, Any]]:
    """What it takes to send each cut's feature to the next device, by itself."""
    if not cuts:
        return []
    placement, stages = fr.placement(settings.K), fr.partition(layers, cuts)
    context = own_of_model(shared_settings(settings, microbatches=None)).get("context")
    batch = random_batch(settings.model, settings.batch_size, context)
    timer = stage_timer(
        (), stages, cross_entropy, OPTIMIZERS[settings.optimizer], batch, placement=placement, hops=HOPS
    )
    timer()
    found: Measured = median([timer() for _ in range(TRANSFER_ROUNDS)])
    rows, h = [], jax.ShapeDtypeStruct(batch.inputs.shape, batch.inputs.dtype)
    for cut, stage, seconds in zip(cuts, stages, found.times.features, strict=False):
        # The size of the feature, from shapes alone.
        params, state = jax.eval_shape(stage.init, jax.random.key(0), h)
        h, _ = jax.eval_shape(stage.apply, params, state, h)
        size = math.prod(h.shape) * h.dtype.itemsize
        rows.append({"cut": cut, "bytes": size, "seconds": seconds, "processor_share": found.transfer_share})
    return rows


def measure(settings: SpeedSettings) -> dict[str, Any]:
    """Makes all contestants, and times them."""
    placed = placed_on(settings.pinned, settings.K)
    own = own_of_model(shared_settings(settings, microbatches=None))
    layers = fr.models.MODELS[settings.model](dtype=jnp.dtype(settings.dtype), **own)
    entries = make_entries(settings, layers)
    turns = in_turns(
        [entry.contestant for entry in entries],
        rounds=settings.rounds,
        steps=settings.steps,
        warm_up=2 * settings.K + 1,
        log=quietly,
    )
    # Medians: a single round that something else on the machine slowed down must not count.
    rows = as_rows(turns)
    baseline = rows[BASELINE]["seconds_median"]
    for entry in entries:
        row = rows[entry.contestant.name]
        speedup = baseline / row["seconds_median"]
        row |= {"method": entry.method, "cuts": list(entry.cuts), "speedup": speedup, "bound": entry.bound}
        row["share_of_bound"] = None if entry.bound is None else speedup / entry.bound
        row["host_share_of_step"] = row["host_seconds_median"] / row["seconds_median"]
    # Each method may have its own cuts. Transfers are timed at those of features replay if it is there.
    cut = next((entry.cuts for entry in entries if entry.method == "fr" and entry.cuts), ())
    cut = cut or next((entry.cuts for entry in entries if entry.cuts), ())
    return {
        "model": settings.model,
        "batch_size": settings.batch_size,
        "dtype": settings.dtype,
        "K": settings.K,
        "balance": "given" if settings.cuts is not None else settings.balance,
        **placed,
        "rounds": settings.rounds,
        "steps_per_round": settings.steps,
        **machine(),
        "baseline": BASELINE,
        "results": rows,
        "transfers": measure_transfers(settings, layers, cut),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = f"{result['model']}, batch {result['batch_size']}, K = {result['K']}, {result['placement']}"
    columns = ("", "s/step", "min", "max", "speedup", "bound", "share", "host ms", "of step", "busy", "cuts")
    body = [
        (
            name,
            *(f"{row[f'seconds_{of}']:.4f}" for of in ("median", "min", "max")),
            f"{row['speedup']:.2f}",
            *(("-", "-") if row["bound"] is None else (f"{row['bound']:.2f}", f"{row['share_of_bound']:.1%}")),
            f"{row['host_seconds_median'] * 1e3:.2f}",
            f"{row['host_share_of_step']:.1%}",
            "/".join(f"{one / row['seconds_median']:.0%}" for one in row["busy_seconds_median_by_process"]),
            ",".join(map(str, row["cuts"])) or "-",
        )
        for name, row in result["results"].items()
    ]
    about = "host: to issue a step; busy: cores that each process's threads keep busy"
    lines = [head, about, "", text_table(columns, body)]
    for row in result["transfers"]:
        lines.append(
            f"a feature of {row['bytes'] / 1e6:.2f} MB at cut {row['cut']} takes {row['seconds'] * 1e3:.1f} ms to the "
            f"next device, whose processors are busy with it for {row['processor_share']:.0%} of that"
        )
    return "\n".join(lines)


def run(settings: SpeedSettings) -> dict[str, Any]:
    """Measures in this process (or as one of a group), and prints, writes and draws what the first process saw.

    Raises:
      SettingsError: a setting cannot be used.
    """
    check(settings)
    take_devices(settings.K)
    try:
        result = measure(settings)
    except ValueError as error:  # of the library, whose messages fit the flags
        raise SettingsError(str(error)) from error
    if is_first():
        print(table(result), flush=True)
        if settings.output is not None:
            write_beside(settings.output, result, png(speed_figure(result)))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments."""

    def work(settings: SpeedSettings) -> Any:
        check(settings)  # before other processes start, which would each refuse
        code = start_pinned("speed", SpeedSettings(), settings)
        return run(settings) if code is None else code

    return harness.main("speed", SpeedSettings(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
