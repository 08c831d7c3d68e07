"""One network by several methods, K and seeds: ``python -m fr_jax.experiments.compare --methods bp fr --K 2``."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check, check_shared
from fr_jax.experiments._cli.command_line import parse
from fr_jax.experiments._cli.harness import FINISHED, one_process
from fr_jax.experiments._cli.per_method import MICROBATCHES_HELP, numbers_of_microbatches
from fr_jax.experiments._cli.settings import PRESETS, SharedSettings, TrainSettings, belongs, owners
from fr_jax.experiments._fields import LARGEST_SEED, SettingsError, documented, flag, guard, setting
from fr_jax.experiments._methods import METHODS, listed
from fr_jax.experiments._run.many_runs import train_all
from fr_jax.experiments._run.tasks import kind_of
from fr_jax.experiments.compare.report import Entry, report

__all__ = ["CompareSettings", "main", "run"]


@documented
@dataclasses.dataclass(frozen=True)
class Axes:
    """What is compared."""

    methods: tuple[str, ...] = setting(
        ("bp", "fr", "ddg", "dni"),
        choices=tuple(METHODS),
        series="distinct",
        help=f"Any of {listed()}. bp does not depend on K, and eqprop and admm have K = 1: one run per seed.",
    )
    K: tuple[int, ...] = setting((4,), least=1, series="distinct")
    """Numbers of stages."""
    seeds: tuple[int, ...] = setting((0,), least=0, most=LARGEST_SEED, series="distinct")
    """The table has the mean over them, and the spread."""
    vary: tuple[str, ...] | None = None
    """One more setting and its values: --vary h-steps 1 2 4. Methods that do not have it run once."""
    learning_rates: tuple[str, ...] = ()
    """For single methods, before --learning-rate: --learning-rates bp=0.1 fr=0.05."""
    workdir: Path | None = None
    """Folder of the comparison. Default: runs/compare-<data set>-<model>."""
    overwrite: bool = False
    """Delete the runs in the folder that are asked for, and start them again."""


@documented
@dataclasses.dataclass(frozen=True)
class CompareSettings(SharedSettings, Axes):
    """Train one network by several methods, K and seeds, on the same mini-batches, and compare.

    Seed by seed, all runs start from the same weights. The folder holds a run each, table.md, comparison.json and
    comparison.png. Given again, the command repeats no run that is finished and continues the one that was stopped.
    """

    microbatches: tuple[str, ...] | None = setting(None, help=MICROBATCHES_HELP)


class Planned(NamedTuple):
    """One run: its folder's name, where it stands in the table, and its settings."""

    name: str
    entry: Entry
    settings: TrainSettings


def plan(settings: CompareSettings) -> list[Planned]:
    """All runs, seed by seed, so that a first seed of everything is there early.

    Raises:
      SettingsError: a setting that no chosen method has, or one that is malformed.
    """
    check_shared(settings, settings.methods)
    rates, variants = _learning_rates(settings), _variants(settings)
    numbers = numbers_of_microbatches(settings.microbatches, settings.methods)
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(SharedSettings)}
    shared["microbatches"] = None
    planned = {}
    for seed in settings.seeds:
        for method in settings.methods:
            # What belongs to other methods keeps its default, since a run refuses settings that are not its own.
            own = {n: value if belongs(n, method, settings.model) else _unset(n) for n, value in shared.items()}
            own["learning_rate"] = rates.get(method, own["learning_rate"])
            if METHODS[method].full_batch and not all(METHODS[other].full_batch for other in settings.methods):
                own["batch_size"] = None  # that of the others
            parts = [{"microbatches": M} for M in numbers.get(method, ())] or [{}]
            stages = (1,) if method == "bp" or METHODS[method].whole else settings.K
            for K, split, variant in itertools.product(stages, parts, variants):
                changed = split | {n: value for n, value in variant.items() if belongs(n, method, settings.model)}
                chosen: dict[str, Any] = {**own, **changed, "K": K, "method": method, "seed": seed}
                run = TrainSettings(**chosen)
                check(run)
                # A method without the varied setting has one run for all its values: the same name.
                name, entry = _placed(run, changed)
                planned[name] = Planned(name, entry, run)
    return list(planned.values())


def _placed(run: TrainSettings, changed: dict[str, Any]) -> tuple[str, Entry]:
    """The name of a run's folder, and where it stands, by what sets it apart from others."""
    own_M = METHODS[run.method].defaults.get("microbatches", 1)
    varied = dict(changed)
    M = varied.pop("microbatches", own_M)
    # Without M where it is the method's own: the folder of a run without the flag.
    words = f"-M{M}" * (own_M != M) + "".join(f"-{flag(name)[2:]}{value}" for name, value in varied.items())
    text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in varied.items())
    return f"{run.method}-K{run.K}{words}-seed{run.seed}", Entry(run.method, run.K, text, run.seed, M)


def _unset(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(SharedSettings) if field.name == name)


def _learning_rates(settings: CompareSettings) -> dict[str, float]:
    rates = {}
    for word in settings.learning_rates:
        method, _, rate = word.partition("=")
        if method in rates:
            raise SettingsError(f"--learning-rates names {method} twice; give one rate for each method.")
        if method not in settings.methods:
            chosen = " ".join(settings.methods)
            raise SettingsError(f"--learning-rates {word} names a method that is not compared: --methods {chosen}.")
        try:
            rates[method] = float(rate)
        except ValueError:
            raise SettingsError(f"--learning-rates {word} is malformed; write METHOD=RATE, such as fr=0.05.") from None
    return rates


def _variants(settings: CompareSettings) -> list[dict[str, Any]]:
    """``[{setting: value}, ...]`` of --vary; one that changes nothing without it."""
    if settings.vary is None:
        return [{}]
    name, *values = settings.vary or ("",)
    name = name.replace("-", "_")
    fields = [field for field in dataclasses.fields(SharedSettings) if not isinstance(field.default, bool)]
    known = [field.name for field in fields if guard(field).vary]
    if name not in known or not values:
        raise SettingsError(
            f"--vary {' '.join(settings.vary)} needs a setting and its values, such as --vary h-steps 1 2 4. It can be "
            f"{', '.join(flag(name)[2:] for name in known)}."
        )
    if owners(name) and not any(belongs(name, method, settings.model) for method in settings.methods):
        raise SettingsError(
            f"--vary {settings.vary[0]} is a setting of {' and '.join(owners(name))}, not compared here. Drop it."
        )
    # The default and the preset's value were not given by the user, and give way to --vary.
    preset = PRESETS.get(settings.preset or "", {}).get(name)
    if getattr(settings, name) not in (_unset(name), preset) or (name == "learning_rate" and settings.learning_rates):
        raise SettingsError(f"{flag(name)} and --vary {settings.vary[0]} were both given. Drop one of them.")
    parsed = [getattr(parse("compare", SharedSettings(), [flag(name), value]), name) for value in values]
    if len(set(parsed)) < len(parsed):
        raise SettingsError(f"--vary {' '.join(settings.vary)} names a value twice; give different ones.")
    return [{name: value} for value in parsed]


def run(settings: CompareSettings) -> int:
    """Trains what is not trained yet, and writes the table and the picture; returns the exit code.

    A run that diverges is a result like another. Raises as :func:`fr_jax.experiments.cifar.run` does.
    """
    one_process(
        "compare trains one run after another in one process.",
        "Start it without fr_jax.launch, or launch fr_jax.experiments.cifar or mnist.",
    )
    planned = plan(settings)
    kind = kind_of(settings.model)
    data = kind.load(settings, preferred=kind.auto)
    home = settings.workdir or Path("runs") / f"compare-{data.name}-{settings.model}"
    entries = {one.name: one.entry for one in planned}
    # Without --overwrite: the printed command goes on with what is there.
    same = dataclasses.replace(settings, dataset=data.name, workdir=home, overwrite=False)
    again = harness.command("compare", CompareSettings(), same)
    write_report = lambda: report(home, entries, data, settings.model, again)
    code = train_all(
        {one.name: one.settings for one in planned},
        home,
        data,
        caller="compare",
        again=again,
        overwrite=settings.overwrite,
        report=write_report,
    )
    if code == FINISHED:
        print(write_report())
        print(f"Picture: {home / 'comparison.png'}   table: {home / 'table.md'}   numbers: {home / 'comparison.json'}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 130 or 143 stopped."""
    return harness.main("compare", CompareSettings(), run, arguments, read=parse)


if __name__ == "__main__":
    sys.exit(main())
