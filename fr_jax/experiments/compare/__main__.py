"""Trains one network by several methods, K and seeds: ``python -m fr_jax.experiments.compare --methods bp fr --K 2``.

All runs see the same mini-batches in the same order and, seed by seed, start from the same weights. The folder holds a
run each, and ``table.md``, ``comparison.json`` and ``comparison.png`` of all. Given again, the command repeats no run
that is finished, and continues the one that was stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fr_jax.data import image_sets as data
from fr_jax.experiments._cli.checks import check, check_shared
from fr_jax.experiments._cli.command_line import command, parse
from fr_jax.experiments._cli.settings import PRESETS, SettingsError, SharedSettings, TrainSettings, flag
from fr_jax.experiments._methods import owners
from fr_jax.experiments._run import program
from fr_jax.experiments._run.many_runs import train_all
from fr_jax.experiments._run.processes import one_process
from fr_jax.experiments.compare.report import Entry, report

__all__ = ["CompareSettings", "main", "run"]


@dataclasses.dataclass(frozen=True)
class Axes:
    """What is compared."""

    methods: tuple[str, ...] = ("bp", "fr", "ddg", "dni")
    """Any of fr, bp, ddg, dni, blockprop, gpipe. bp does not depend on K: it runs once a seed, on one device."""
    K: tuple[int, ...] = (4,)
    """Numbers of modules."""
    seeds: tuple[int, ...] = (0,)
    """The table has the mean over them, and the spread."""
    vary: tuple[str, ...] | None = None
    """One more setting and its values: --vary h-steps 1 2 4. Methods that do not have it run once."""
    learning_rates: tuple[str, ...] = ()
    """For single methods, before --learning-rate: --learning-rates bp=0.1 fr=0.05."""
    workdir: Path | None = None
    """Folder of the comparison. Default: runs/compare-<data set>-<model>."""
    overwrite: bool = False
    """Delete the runs in the folder that are asked for, and start them again."""


@dataclasses.dataclass(frozen=True)
class CompareSettings(SharedSettings, Axes):
    """Train one network by several methods, K and seeds, on the same mini-batches, and compare.

    The folder holds a run each, table.md, comparison.json and comparison.png. Given again, the command repeats no run
    that is finished and continues the one that was stopped.
    """


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
    for name in ("methods", "K", "seeds"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            problem = "is empty" if not values else f"{' '.join(map(str, values))} names one twice"
            raise SettingsError(f"{flag(name)} {problem}; give one or more different values.")
    rates, variants = _learning_rates(settings), _variants(settings)
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(SharedSettings)}
    planned = {}
    for seed in settings.seeds:
        for method in settings.methods:
            own = {name: value if _has(settings, method, name) else _unset(name) for name, value in shared.items()}
            own["learning_rate"] = rates.get(method, settings.learning_rate)
            for K in (1,) if method == "bp" else settings.K:
                for variant in variants:
                    changed = {name: value for name, value in variant.items() if _has(settings, method, name)}
                    text = "".join(f"-{flag(name)[2:]}{value}" for name, value in changed.items())
                    chosen: dict[str, Any] = {**own, **changed, "K": K, "method": method, "seed": seed}
                    run = TrainSettings(**chosen)
                    check(run)
                    name = f"{method}-K{K}{text}-seed{seed}"
                    planned[name] = Planned(name, Entry(method, K, _words(changed), seed), run)
    return list(planned.values())


def _has(settings: SharedSettings, method: str, name: str) -> bool:
    return not owners(name) or bool({method, settings.model} & {*owners(name)})


def _unset(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(SharedSettings) if field.name == name)


def _words(changed: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changed.items())


def _learning_rates(settings: CompareSettings) -> dict[str, float]:
    rates = {}
    for word in settings.learning_rates:
        method, _, rate = word.partition("=")
        try:
            rates[method] = float(rate)
        except ValueError:
            raise SettingsError(f"--learning-rates {word} is malformed; write METHOD=RATE, such as fr=0.05.") from None
        if len(rates) < len(settings.learning_rates[: settings.learning_rates.index(word) + 1]):
            raise SettingsError(f"--learning-rates names {method} twice; give one rate for each method.")
        if method not in settings.methods:
            chosen = " ".join(settings.methods)
            raise SettingsError(f"--learning-rates {word} names a method that is not compared: --methods {chosen}.")
    return rates


def _variants(settings: CompareSettings) -> list[dict[str, Any]]:
    """``[{setting: value}, ...]`` of --vary; one that changes nothing without it."""
    if settings.vary is None:
        return [{}]
    name, *values = settings.vary or ("",)
    name = name.replace("-", "_")
    known = [field.name for field in dataclasses.fields(SharedSettings) if field.name not in NOT_TO_VARY]
    if name not in known or not values:
        raise SettingsError(
            f"--vary {' '.join(settings.vary)} needs a setting and its values, such as --vary h-steps 1 2 4. It can be "
            f"{', '.join(flag(name)[2:] for name in known)}."
        )
    if owners(name) and not any(_has(settings, method, name) for method in settings.methods):
        raise SettingsError(
            f"--vary {settings.vary[0]} is a setting of {' and '.join(owners(name))}, not compared here. Drop it."
        )
    preset = PRESETS.get(settings.preset or "", {}).get(name)
    if getattr(settings, name) not in (_unset(name), preset) or (name == "learning_rate" and settings.learning_rates):
        raise SettingsError(f"{flag(name)} and --vary {settings.vary[0]} were both given. Drop one of them.")
    parsed = [getattr(parse("compare", SharedSettings(), [flag(name), value]), name) for value in values]
    if len(set(parsed)) < len(parsed):
        raise SettingsError(f"--vary {' '.join(settings.vary)} names a value twice; give different ones.")
    return [{name: value} for value in parsed]


NOT_TO_VARY = {
    *("dataset", "data_dir", "devices", "preset", "model", "milestones"),
    *("eval_every", "checkpoint_every", "log_every", "compilation_cache"),
    *(field.name for field in dataclasses.fields(SharedSettings) if isinstance(field.default, bool)),
}


def run(settings: CompareSettings) -> int:
    """Trains what is not trained yet, and writes the table and the picture; returns the exit code.

    A run that diverges is a result like another.

    Raises:
      ValueError: a setting cannot be used, data are missing, or the folder holds other runs.
      CheckpointError, OSError: the folder cannot be read or written, because the disk is full for example.
    """
    one_process(
        "compare trains one run after another in one process.",
        "Start it without fr_jax.launch, or launch fr_jax.experiments.cifar or mnist.",
    )
    planned = plan(settings)
    preferred = "mnist" if settings.model == "mlp" else "cifar10"
    dataset = data.load(settings.dataset, settings.data_dir, preferred=preferred)
    home = settings.workdir or Path("runs") / f"compare-{dataset.name}-{settings.model}"
    entries = {one.name: one.entry for one in planned}
    same = dataclasses.replace(settings, dataset=dataset.name, workdir=home, overwrite=False)
    again = command("compare", CompareSettings(), same)
    write_report = lambda: report(home, entries, dataset, settings.model, again)
    code = train_all(
        {one.name: one.settings for one in planned},
        home,
        dataset,
        caller="compare",
        again=again,
        overwrite=settings.overwrite,
        report=write_report,
    )
    if code == program.FINISHED:
        print(write_report())
        print(f"Picture: {home / 'comparison.png'}   table: {home / 'table.md'}   numbers: {home / 'comparison.json'}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 130 or 143 stopped."""
    words = sys.argv[1:] if arguments is None else arguments
    return program.exit_code(lambda: run(parse("compare", CompareSettings(), words)))


if __name__ == "__main__":
    sys.exit(main())
