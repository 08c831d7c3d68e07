"""Times a step for every place to cut: ``python -m fr_jax.experiments.balance --K 2 --pinned``.

Every choice of cuts has its turn in every round. Beside the best stand the cuts that ``--balance`` chooses by times, by
operations and by equal numbers of layers, and how much slower than the best they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fr_jax as fr
from fr_jax.distributed import is_first
from fr_jax.experiments._bench.contestants import make_entry, method_settings, shared_costs, shared_settings
from fr_jax.experiments._bench.pinned import placed_on, start_pinned
from fr_jax.experiments._bench.turns import as_rows, in_turns, quietly
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check_own
from fr_jax.experiments._cli.devices import take_devices
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine
from fr_jax.experiments._cli.results import check_file, write_beside
from fr_jax.experiments._cli.settings import SharedSettings
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import SettingsError, check_fields, documented, setting
from fr_jax.experiments._methods import METHODS, listed
from fr_jax.experiments._models import example_inputs
from fr_jax.experiments._run.cuts import choose_cuts, stage_costs
from fr_jax.plotting.style import COLOURS, page, plain_axes, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BalanceSettings", "main", "run"]

MEASURES = ("time", "flops", "uniform")
MOST_CHOICES = 200  # each is compiled, and its state stays in memory


@documented
@dataclasses.dataclass(frozen=True)
class BalanceSettings:
    """Time one training step for every choice of cuts, and compare those that --balance chooses with the best."""

    K: int = setting(2, least=2)
    """Stages."""
    method: str = setting("fr", choices=tuple(METHODS), help=f"{listed()}.")
    model: str = setting("resnet20", choices=tuple(fr.models.MODELS))
    """A name from fr_jax.models.MODELS."""
    batch_size: int = setting(128, least=1)
    """Examples of a mini-batch of 32x32x3 images, or of windows of 128 bytes (random; only shapes matter here)."""
    rounds: int = setting(5, least=1)
    """How many times each choice has its turn."""
    steps: int = setting(4, least=1)
    """Steps of a turn."""
    first: int = setting(1, least=1)
    """No cut before this layer (to leave out what is hopeless, or to divide a long measurement)."""
    last: int | None = None
    """No cut after this layer. Default: the network's last."""
    pinned: bool = False
    """One process a stage, each pinned to one core."""
    output: Path | None = None
    """A JSON file for the numbers; the picture gets its name with .png."""
    overwrite: bool = False
    """Replace these files where they exist."""


def check(settings: BalanceSettings) -> None:
    """Raises SettingsError for the first setting that cannot be used."""
    check_fields(settings)
    check_own(shared_settings(settings), settings.method, settings.K)
    if not settings.pinned:
        one_process("balance without --pinned measures in one process.")
    check_file(settings.output, overwrite=settings.overwrite)


def choices_of_cuts(settings: BalanceSettings, layers: int) -> list[tuple[int, ...]]:
    """All of them.

    Raises:
      SettingsError: there are none, or too many to time.
    """
    last = layers - 1 if settings.last is None else min(settings.last, layers - 1)
    places = range(settings.first, last + 1)
    found = math.comb(len(places), settings.K - 1)
    if not 1 <= found <= MOST_CHOICES:
        raise SettingsError(
            f"--K {settings.K} can be cut in {found} ways at the {len(places)} places of --model {settings.model} "
            f"between --first {settings.first} and --last {last}; it must be 1 to {MOST_CHOICES}. Change one of them."
        )
    return list(itertools.combinations(places, settings.K - 1))


def measure(settings: BalanceSettings) -> dict[str, Any]:
    """Costs of the layers, the cuts they choose, and a step's time for all cuts."""
    placed = placed_on(settings.pinned, settings.K)
    layers = fr.models.MODELS[settings.model]()
    example = example_inputs(settings.model, settings.batch_size)
    all_cuts = choices_of_cuts(settings, len(layers))
    shared = SharedSettings(model=settings.model, batch_size=settings.batch_size)
    own = method_settings(shared, settings.method, settings.K, None)
    chosen, predicted = {}, {}
    for name in MEASURES:
        by = dataclasses.replace(own, balance=name)
        quietly(f"balance: {name}")
        costs = None if name == "uniform" else shared_costs(by, layers, example)
        chosen[name] = choose_cuts(by, layers, example, costs)
        if costs is not None:
            predicted[name] = [stage_costs(by, costs, cuts) for cuts in all_cuts]
    entries = [make_entry(shared, layers, settings.method, settings.K, cuts=cuts) for cuts in all_cuts]
    named = [entry.contestant._replace(name=",".join(map(str, entry.cuts))) for entry in entries]
    # Stages begin to update up to K-1 steps late: only after the warm-up is everything compiled.
    turns = in_turns(named, rounds=settings.rounds, steps=settings.steps, warm_up=2 * settings.K + 1, log=quietly)
    rows = as_rows(turns)
    for i, (row, cuts) in enumerate(zip(rows.values(), all_cuts, strict=True)):
        row |= {"cuts": list(cuts), "stage_seconds": predicted["time"][i], "stage_flops": predicted["flops"][i]}
    best = min(rows.values(), key=lambda row: row["seconds_median"])
    picked = {}
    for name, cuts in chosen.items():
        row = rows.get(",".join(map(str, cuts)))  # None: outside of --first and --last
        over = None if row is None else row["seconds_median"] / best["seconds_median"]
        picked[name] = {"cuts": list(cuts), "times_the_best": over}
    return {
        "model": settings.model,
        "method": settings.method,
        "batch_size": settings.batch_size,
        "K": settings.K,
        "layers": len(layers),
        **placed,
        "rounds": settings.rounds,
        "steps_per_round": settings.steps,
        **machine(),
        "best": best["cuts"],
        "chosen": picked,
        "results": rows,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    head = f"{result['model']}, {result['method']}, batch {result['batch_size']}, K = {result['K']}"
    body = [
        (
            name,
            *(f"{row[f'seconds_{of}']:.4f}" for of in ("median", "min", "max")),
            " ".join(f"{one:.4f}" for one in row["stage_seconds"]),
            "best" if row["cuts"] == result["best"] else "",
        )
        for name, row in result["results"].items()
    ]
    columns = ("cuts", "s/step", "min", "max", "seconds of each stage by its layers' times", "")
    lines = [f"{head}, {result['placement']}", "", text_table(columns, body)]
    for name, row in result["chosen"].items():
        over = row["times_the_best"]
        text = "which was not timed" if over is None else f"{over:.3f} times the best"
        lines.append(f"--balance {name:<8} cuts {','.join(map(str, row['cuts']))}: {text}")
    return "\n".join(lines)


def figure(result: Mapping[str, Any]) -> Figure:
    """A step's time against the cuts, the predicted slowest stage below it, and the cuts that are chosen."""
    rows = list(result["results"].values())
    places = range(len(rows))
    title = f"{result['model']}, {METHODS[result['method']].title}, K = {result['K']}, {result['placement']}"
    drawing, space = page(10, 5, title, f"{result['machine']}, jax {result['jax']}, {result['date']}")
    axes = space.subplots()
    low, high = ([row[f"seconds_{of}"] for row in rows] for of in ("min", "max"))
    axes.fill_between(places, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(places, [row["seconds_median"] for row in rows], "o-", color=COLOURS[0], label="a step, measured")
    slowest = [max(row["stage_seconds"]) for row in rows]
    axes.plot(places, slowest, "--", color="0.4", label="its slowest stage, by the times of the layers")
    for i, (name, chosen) in enumerate(result["chosen"].items()):
        at = next((place for place in places if rows[place]["cuts"] == chosen["cuts"]), None)
        if at is not None:
            label = f"--balance {name}: {chosen['times_the_best']:.2f} times the best"
            style = {"markersize": 13 + 6 * i, "markerfacecolor": "none", "markeredgewidth": 1.8, "linestyle": "none"}
            axes.plot(at, rows[at]["seconds_median"], "o", color=COLOURS[i + 1], label=label, **style)
    axes.set_xticks(places, [",".join(map(str, row["cuts"])) for row in rows], rotation=90 if len(rows) > 30 else 0)
    axes.set_xlabel(
        "first layer of the second stage" if result["K"] == 2 else "first layers of the stages after the first"
    )
    axes.set_ylabel("seconds a step")
    axes.set_ylim(bottom=0)
    plain_axes(axes)
    axes.legend(frameon=False)
    return drawing


def run(settings: BalanceSettings) -> dict[str, Any]:
    """Measures in this process (or as one of a group), and prints, writes and draws what the first process saw.

    Raises:
      SettingsError: a setting cannot be used.
    """
    check(settings)
    take_devices(settings.K, each=True)
    try:
        result = measure(settings)
    except ValueError as error:  # of the library, whose messages fit the flags
        raise SettingsError(str(error)) from error
    if is_first():
        print(table(result), flush=True)
        if settings.output is not None:
            write_beside(settings.output, result, png(figure(result)))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments."""

    def work(settings: BalanceSettings) -> Any:
        check(settings)  # before other processes start, which would each refuse
        code = start_pinned("balance", BalanceSettings(), settings)
        return run(settings) if code is None else code

    return harness.main("balance", BalanceSettings(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
