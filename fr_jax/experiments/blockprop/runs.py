"""One run of a BlockProp figure: a step size for each block, and the gluing loss beside loss and accuracy."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fr_jax as fr
from fr_jax._files import write_json
from fr_jax.data.image_sets import Dataset
from fr_jax.experiments._cli.checks import differences, resolve
from fr_jax.experiments._cli.settings import TrainSettings, as_json, own_of_method
from fr_jax.experiments._run.console import Console
from fr_jax.experiments._run.optimizers import make_optimizer
from fr_jax.experiments._run.program import make_intervals
from fr_jax.experiments._run.records import make_config, make_summary
from fr_jax.experiments._run.session import Session, build, initial_state
from fr_jax.training.checkpoints import Checkpoints
from fr_jax.training.classification import cross_entropy, training_metrics
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.loop import Outcome, Totals, train
from fr_jax.training.metrics_log import MetricsLog
from fr_jax.training.run_folder import RunFolder, WorkdirError
from fr_jax.types import Algorithm

__all__ = ["Run", "first_block_factor", "is_finished", "train_run"]

OWN = {"block_learning_rates": "the blocks' step sizes", "test_examples": "the number of test images"}
"""What ``config.json`` has beyond the settings of a run, and what it is."""


class Run(NamedTuple):
    """One run of a figure.

    Attributes:
      settings: of the run; ``penalty``, ``h_steps`` and ``h_learning_rate`` are BlockProp's own.
      rates: gamma_B1, gamma_B2, the step size of each block. Back-propagation has them too.
    """

    settings: TrainSettings
    rates: tuple[float, float]

    @property
    def name(self) -> str:
        """Of its folder: ``blockprop-penalty10-steps4-rates0.1-0.1-seed0``."""
        s, rates = self.settings, "-".join(f"{rate:g}" for rate in self.rates)
        values = own_of_method(s, s.method)
        own = f"-penalty{values['penalty']:g}-steps{values['h_steps']}" if s.method == "blockprop" else ""
        return f"{s.method}{own}-rates{rates}-seed{s.seed}"

    @property
    def factor(self) -> float:
        """Block 1's step as a multiple of what back-propagation with gamma_B2 would do, to first order in gamma_h."""
        s, scale = self.settings, self.rates[0] / self.rates[1]
        if s.method != "blockprop":
            return scale
        own = own_of_method(s, s.method)
        return scale * first_block_factor(own["penalty"], own["h_learning_rate"], own["h_steps"])


def first_block_factor(penalty: float, h_learning_rate: float, h_steps: int) -> float:
    """How much of back-propagation's gradient block 1 of two gets: 1 - (1 - 2 lambda gamma_h)^{N_h}.

    N_h steps from h = b_1(x) on loss(h) + lambda ||h - b_1(x)||^2 with a loss that is linear in h, of slope d, end at
    b_1(x) - d (1 - (1 - 2 lambda gamma_h)^{N_h}) / (2 lambda); block 1's gradient is 2 lambda times what is missing.
    With one step that is exact for every loss. It is not the paper's, which does not say how much reaches block 1.

    Args:
      penalty: lambda_1.
      h_learning_rate: gamma_h.
      h_steps: N_h.

    Returns:
      1 is back-propagation's gradient; 0 nothing; negative values climb.

    Example:
      >>> [round(first_block_factor(penalty, 0.01, 4), 4) for penalty in (1, 10, 50, 90, 100, 110)]
      [0.0776, 0.5904, 1.0, 0.5904, 0.0, -1.0736]
    """
    return 1 - (1 - 2 * penalty * h_learning_rate) ** h_steps


class GluingConsole(Console):
    """The console of a run whose training rows have their gluing loss under a name without a stage."""

    def row(self, row: dict[str, Any]) -> None:
        """A row of ``metrics.jsonl``; with dozens of runs, a test row is not worth a line on the screen."""
        if "gluing_loss/1" in row:
            row = row | {"gluing_loss": row["gluing_loss/1"]}
        if "test_loss" in row:
            self._log.write(row)
        else:
            super().row(row)


def make_algorithm(session: Session, rates: Sequence[float]) -> Algorithm:
    """The method of the session's settings with a step size for each block."""
    s, per_epoch = session.settings, session.task.pipeline.steps_per_epoch
    stages = fr.partition(session.layers, session.cuts)
    each = [make_optimizer(dataclasses.replace(s, learning_rate=rate), per_epoch) for rate in rates]
    common: dict[str, Any] = {"placement": session.placement, "donate": True, "metrics_fn": training_metrics}
    if s.method == "bp":
        return fr.backprop(stages, cross_entropy, each if s.K > 1 else each[-1], **common)
    own = {name: getattr(s, name) for name in ("penalty", "h_steps", "h_learning_rate")}
    return fr.blockprop(stages, cross_entropy, each, **own, **common)


def is_finished(folder: RunFolder, run: Run, dataset: Dataset) -> bool:
    """Whether the folder holds this very run, over.

    Raises:
      WorkdirError: it holds another, or one that is longer.
    """
    saved, summary = folder.saved_config(), folder.saved_summary()
    if saved is None:
        return False
    resolved = resolve(run.settings, dataset.name, len(dataset.train_labels))
    expected = as_json(resolved) | _own(run, dataset) | {"resolved_cuts": saved.get("resolved_cuts")}
    if different := _differences(saved, expected):
        raise WorkdirError(
            f"{folder.path} holds a run with other settings: {'; '.join(different)}. Repeat its settings, use another "
            "--workdir, or start again with --overwrite."
        )
    if summary is not None and not summary["diverged"] and summary["steps"] > resolved.steps:
        raise WorkdirError(
            f"{folder.path} holds a run of {summary['steps']:,} steps, more than the {resolved.steps:,} asked for. Ask "
            "for as many with --steps or --epochs, or use another --workdir."
        )
    return summary is not None and (summary["diverged"] or summary["steps"] == resolved.steps)


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changed = {name: text for name, text in OWN.items() if saved.get(name) != now[name]}
    own = [f"{text}: {now[name]}, was {saved.get(name)}" for name, text in changed.items()]
    return [*differences(saved, now), *own]


def _own(run: Run, dataset: Dataset) -> dict[str, Any]:
    return {"block_learning_rates": list(run.rates), "test_examples": len(dataset.test_labels)}


def train_run(run: Run, dataset: Dataset, folder: RunFolder, stop: StopRequest) -> Outcome:
    """Trains the run into its folder, from its newest checkpoint where there is one.

    Returns:
      How it ended; with ``finished`` or ``divergence`` set, the folder has its summary.

    Raises:
      WorkdirError: the folder holds another run, or another process trains there.
      CheckpointError, OSError: the folder cannot be read or written.
    """
    settings = dataclasses.replace(run.settings, dataset=dataset.name, workdir=folder.path)
    session = build(
        resolve(settings, dataset.name, len(dataset.train_labels)),
        dataset,
        (folder.saved_config() or {}).get("resolved_cuts"),
    )
    session = session._replace(algorithm=make_algorithm(session, run.rates))
    config = make_config(session) | _own(run, dataset)
    with folder.locked(), Checkpoints(folder.checkpoints) as checkpoints:
        folder.check_same(config, _differences)
        state, totals, first = initial_state(session), Totals(), None
        if folder.holds_run() and (restored := checkpoints.restore(state)) is not None:
            state, totals, first = restored.state, Totals.from_metadata(restored.metadata), restored.step
        folder.claim(config, overwrite=folder.holds_run() and first is None)
        with _console(session, folder, first) as console:
            outcome = train(
                session.algorithm,
                session.task,
                state,
                make_intervals(session.settings),
                checkpoints=checkpoints,
                stop=stop,
                report=console,
                totals=totals,
            )
        if outcome.finished or outcome.divergence is not None:
            write_json(folder.summary, make_summary(session, outcome))
    return outcome


@contextlib.contextmanager
def _console(session: Session, folder: RunFolder, first: int | None) -> Iterator[GluingConsole]:
    with MetricsLog(folder.metrics, resume_step=first) as log:
        console = GluingConsole(session, log, first or 0)
        try:
            yield console
        finally:
            console.close()
