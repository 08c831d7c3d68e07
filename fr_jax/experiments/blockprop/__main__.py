"""Figures 2 and 3 of the BlockProp paper: ``python -m fr_jax.experiments.blockprop --figure 2``.

Figure 2: one hidden layer on MNIST, two blocks, the number of h-steps N_h and the penalty lambda_1 varied. Figure 3: a
residual network on CIFAR-10, two blocks, lambda_1 and the blocks' step sizes varied. Runs of one seed start from the
same weights and see the same mini-batches. Given again, the command repeats no run that is finished.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fr_jax.data import image_sets as data
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check
from fr_jax.experiments._cli.checks import resolve as resolved_run
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.results import write_results
from fr_jax.experiments._cli.settings import TrainSettings
from fr_jax.experiments._run.compiled import keep_compiled
from fr_jax.experiments.blockprop.picture import figure
from fr_jax.experiments.blockprop.result import Line, summarise, table
from fr_jax.experiments.blockprop.runs import Run, is_finished, train_run
from fr_jax.experiments.blockprop.settings import BlockPropSettings, resolve
from fr_jax.plotting.style import png
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.run_folder import RunFolder

__all__ = ["BlockPropSettings", "main", "plan", "run"]

PENALTY_PANELS = (4, 2)
"""N_h of the two panels of figure 2 in which lambda_1 varies."""


def plan(settings: BlockPropSettings) -> list[Line]:
    """The lines of the figure, each with a run a seed; a run may belong to several lines.

    Args:
      settings: resolved.

    Raises:
      SettingsError: a run cannot be as it is asked for.
    """
    return _figure_2(settings) if settings.figure == 2 else _figure_3(settings)


def _figure_2(s: BlockPropSettings) -> list[Line]:
    rate, lines = s.learning_rate, []
    assert rate is not None and s.h_steps is not None and s.penalties is not None and s.scales is not None
    lines.append(_line(s, "baseline", "back-propagation", (rate, rate)))
    lines.append(_line(s, "frozen", "block 1 frozen ($N_h = 0$)", (rate, rate), penalty=1.0, h_steps=0))
    for h_steps in s.h_steps:
        lines.append(_line(s, "h_steps", f"$N_h = {h_steps}$", (rate, rate), penalty=1.0, h_steps=h_steps))
    for h_steps, penalty in itertools.product(PENALTY_PANELS, s.penalties):
        panel, label = f"penalty, N_h = {h_steps}", rf"$\lambda_1 = {penalty:g}$"
        lines.append(_line(s, panel, label, (rate, rate), penalty=penalty, h_steps=h_steps))
    for scale in s.scales:
        lines.append(_line(s, "control", f"back-propagation, block 1's step x {scale:g}", (scale * rate, rate)))
    return lines


def _figure_3(s: BlockPropSettings) -> list[Line]:
    assert s.learning_rate is not None and s.choices is not None
    rate = s.learning_rate
    lines = [_line(s, "baseline", rf"back-propagation, $\gamma = {rate:g}$", (rate, rate))]
    for penalty, first, second in s.choices:
        label = rf"$\lambda_1 = {penalty:g}$, $\gamma_{{B_1}} = {first:g}$, $\gamma_{{B_2}} = {second:g}$"
        lines.append(_line(s, "choices", label, (first, second), penalty=penalty, h_steps=1))
    return lines


def _line(s: BlockPropSettings, panel: str, label: str, rates: tuple[float, float], **own: Any) -> Line:
    """With ``penalty`` and ``h_steps`` BlockProp, without them back-propagation."""
    network: dict[str, Any] = {"depth": 2, "width": s.width} if s.figure == 2 else {}
    if own:
        own["h_learning_rate"] = s.h_learning_rate
    runs = []
    for seed in s.seeds or ():
        settings = TrainSettings(
            method="blockprop" if own else "bp",
            K=2 if own or rates[0] != rates[1] else 1,
            model=s.model or "",
            balance="uniform",
            learning_rate=rates[1],
            momentum=s.momentum or 0.0,
            weight_decay=0.0,
            milestones=s.milestones,
            batch_size=s.batch_size,
            epochs=s.epochs,
            steps=s.steps,
            seed=seed,
            eval_every=s.eval_every,
            devices=1,
            **network,
            **own,
        )
        check(settings)
        runs.append(Run(settings, rates))
    return Line(panel, label, tuple(runs))


class Place(NamedTuple):
    """Where everything of one call is."""

    home: Path
    dataset: data.Dataset
    runs: dict[str, Run]

    def folder(self, name: str) -> RunFolder:
        """Of a run, by its name."""
        return RunFolder(self.home / name)


def run(settings: BlockPropSettings) -> int:
    """Trains what is not trained yet, writes numbers, table and picture, and returns the exit code.

    Raises:
      ValueError: a setting cannot be used, data are missing, or the folder holds other runs.
      CheckpointError, OSError: the folder cannot be read or written.
    """
    one_process("blockprop trains one run after another in one process.")
    settings = resolve(settings)
    lines = plan(settings)
    keep_compiled(settings.compilation_cache)
    dataset = data.load(settings.dataset, settings.data_dir, preferred="mnist" if settings.figure == 2 else "cifar10")
    shown = settings.test_examples or len(dataset.test_labels)
    dataset = dataset._replace(test_images=dataset.test_images[:shown], test_labels=dataset.test_labels[:shown])
    by_seed = sorted((run.settings.seed, number, run) for number, line in enumerate(lines) for run in line.runs)
    place = Place(
        settings.workdir or Path("runs") / f"blockprop-figure-{settings.figure}",
        dataset,
        {one.name: one for _, _, one in by_seed},
    )
    for name, one in place.runs.items():
        resolved_run(one.settings, dataset.name, len(dataset.train_labels))
        place.folder(name).check_free(resume=True, overwrite=True)
        if settings.overwrite:
            with place.folder(name).locked():
                place.folder(name).clear()
    stopped = _train_all(place)
    result = summarise(settings, lines, place.home, dataset)
    text = table(result)
    code = harness.FINISHED
    if result["lines"]:
        name = f"figure-{settings.figure}"
        files = {f"{name}.json": result, f"{name}.png": png(figure(result)), "table.md": f"{text}\n".encode()}
        code = write_results(place.home, files)
        print(f"\n{text}\n\nPicture, numbers and table are in {place.home}.")
    if stopped:
        print("Stopped; what was trained is saved. Give the same command again to go on.")
    return stopped or code


def _train_all(place: Place) -> int:
    """One run after another, in this process; the exit code of a stop, or 0."""
    over = {name for name, one in place.runs.items() if is_finished(place.folder(name), one, place.dataset)}
    with StopRequest() as stop:
        for number, (name, one) in enumerate(place.runs.items(), start=1):
            done = " is finished already." if name in over else ""
            print(f"[{number}/{len(place.runs)}] {name}{done}", flush=True)
            if done:
                continue
            outcome = train_run(one, place.dataset, place.folder(name), stop)
            if outcome.divergence is not None:
                print(f"It diverged: {outcome.divergence.what} at step {outcome.divergence.step}.")
            if stop.signal is not None:
                return stop.exit_code
    return harness.FINISHED


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 130 or 143 stopped."""
    return harness.main("blockprop", BlockPropSettings(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
