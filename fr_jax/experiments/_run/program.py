"""What the training programs do: one run, from its settings to its exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from fr_jax import distributed
from fr_jax._files import write_json
from fr_jax.experiments._cli import command_line, harness
from fr_jax.experiments._cli.checks import check, differences
from fr_jax.experiments._cli.command_line import Program
from fr_jax.experiments._cli.devices import request_devices
from fr_jax.experiments._cli.harness import DIVERGED, FINISHED, fail
from fr_jax.experiments._cli.settings import Resolved, TrainSettings, as_json, titled
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._run import processes
from fr_jax.experiments._run.compiled import keep_compiled
from fr_jax.experiments._run.console import Console, announce, show, unread
from fr_jax.experiments._run.init_from import start_from
from fr_jax.experiments._run.records import make_config, make_summary
from fr_jax.experiments._run.session import Session, build, initial_state
from fr_jax.experiments._run.tasks import Data, resolve_for
from fr_jax.plotting.curves import plot_curves
from fr_jax.training.checkpoints import Checkpoints
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.loop import Hook, Intervals, Outcome, Reporter, Totals, train
from fr_jax.training.metrics_log import MetricsLog, read_rows
from fr_jax.training.profiler import Profiler
from fr_jax.training.run_folder import RunFolder, WorkdirError

__all__ = ["main", "run"]

MakeHook: TypeAlias = Callable[[Session, RunFolder, int], AbstractContextManager[Hook]]
"""``(session, folder, first step)``: the hook of a run; it is left when training ends, however it ends."""


def main(program: Program, arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 3 diverged, 130 or 143 stopped."""
    return harness.main(
        program.name,
        program.defaults,
        lambda settings: run(program, settings),
        arguments,
        read=command_line.parse,
    )


def run(
    program: Program,
    settings: TrainSettings,
    *,
    data: Any = None,
    again: str | None = None,
    stop: StopRequest | None = None,
    hook: MakeHook | None = None,
) -> int:
    """Trains as ``settings`` say, and returns the exit code; ``harness.EXIT_CODES`` has what it raises.

    ``data`` was loaded already, or is None. ``again`` is the command that continues a stopped run, if not the
    program's own. ``stop`` is an active request to stop, if several runs share one; ``hook`` looks on while the method
    trains. In a run of several processes each calls this with the same settings; process 0 alone uses the folder.
    """
    check(settings)
    processes.join(settings)
    keep_compiled(settings.compilation_cache)
    group = distributed.group()
    # Before JAX is asked for its devices, whose number is fixed from then on.
    request_devices(math.ceil((settings.devices or settings.K * settings.data_parallel) / group.size))
    # A folder that was given is looked at before data are fetched.
    early = RunFolder(settings.workdir) if settings.workdir is not None else None
    group.from_first(lambda: early and early.check_free(resume=settings.resume, overwrite=settings.overwrite))
    data = data or processes.load_data(settings, program.dataset)
    resolved = resolve_for(settings, data)
    folder = RunFolder(resolved.workdir)
    group.from_first(lambda: folder.check_free(resume=settings.resume, overwrite=settings.overwrite))
    session = _build(resolved, data, folder)
    config = as_json(settings) | make_config(session)
    processes.check_same_settings(config)
    if again is None:
        same = dataclasses.replace(settings, dataset=data.name, workdir=folder.path, resume=True, overwrite=False)
        again = processes.launched(harness.command(program.name, program.defaults, same))
    lock = folder.locked() if distributed.is_first() else contextlib.nullcontext()
    with lock, contextlib.nullcontext(stop) if stop else StopRequest() as request:
        # Again: while this run was prepared, another may have been finished here.
        group.from_first(lambda: folder.check_free(resume=settings.resume, overwrite=settings.overwrite))
        if settings.resume:
            group.from_first(lambda: folder.check_same(config, differences))
        code = _train(session, data, folder, config, again, request, hook)
        group.exchange(code)  # nobody leaves while process 0 still draws
        return code


def _build(settings: Resolved, data: Data, folder: RunFolder) -> Session:
    """The session; a run that is resumed keeps its cuts, unless others were given."""
    saved = distributed.group().from_first(lambda: folder.saved_config() if settings.resume else None) or {}
    same_network = (saved.get("model"), saved.get("K")) == (settings.model, settings.K)
    cuts = saved.get("resolved_cuts") if same_network and settings.cuts is None else None
    try:
        return build(settings, data, cuts)
    except ValueError as error:  # of the library, whose messages fit the flags
        raise SettingsError(str(error)) from error


def _train(
    session: Session,
    data: Data,
    folder: RunFolder,
    config: dict[str, Any],
    again: str,
    stop: StopRequest,
    hook: MakeHook | None,
) -> int:
    s, group = session.settings, distributed.group()
    say: Callable[..., object] = print if distributed.is_first() else lambda *text, **how: None
    state, totals = initial_state(session), Totals()
    with Checkpoints(folder.checkpoints) as checkpoints:
        restored = None
        if s.resume:
            restored = checkpoints.restore(state)
            if restored is None:
                say(f"There is no checkpoint in {folder.checkpoints}; starting from the beginning.")
            else:
                state, totals = restored.state, Totals.from_metadata(restored.metadata)
                step = restored.step
                if group.from_first(lambda: is_over(folder, step, s)):
                    return FINISHED
                say(f"Resuming after step {step:,} of {s.steps:,}.")
        if s.init_from is not None and restored is None:
            state, line = start_from(s.init_from, session, state, data)
            say(line)
        # Only now, when everything is ready to train: an error before this leaves the old run as it was.
        group.from_first(lambda: folder.claim(config, overwrite=s.overwrite))
        with unread():
            say(announce(session, state), flush=True)
        with contextlib.ExitStack() as stack:
            report = stack.enter_context(reporting(session, folder, state.step))
            hooks = [stack.enter_context(made) for made in _hooks(session, folder, state.step, hook)]
            stack.enter_context(group.watched())
            outcome = train(
                session.algorithm,
                session.task,
                state,
                Intervals(s.steps, s.log_every, s.eval_every, s.checkpoint_every, ahead=2 * s.K),
                checkpoints=checkpoints,
                stop=stop,
                report=report,
                hooks=hooks,
                totals=totals,
            )
        stopped = stop.signal is not None and not outcome.finished and outcome.divergence is None
        make_sample = session.task.sample if outcome.finished else None  # which all processes do
        sample = None if make_sample is None else make_sample(session.algorithm.predict, outcome.state)
        if not distributed.is_first():
            return stop.exit_code if stopped else DIVERGED if outcome.divergence is not None else FINISHED
        if stopped:
            draw(session, folder)
            print(f"Stopped after step {outcome.step:,} of {s.steps:,}; everything is saved. Continue with\n  {again}")
            return stop.exit_code
        return _close(session, folder, outcome, checkpoints, sample)


def _hooks(
    session: Session, folder: RunFolder, first_step: int, hook: MakeHook | None
) -> Iterator[AbstractContextManager[Hook]]:
    s = session.settings
    if s.profile and distributed.is_first():
        yield Profiler(folder.profile, first_step, s.steps, warm_up=4 * s.K)
    if hook is not None:
        yield hook(session, folder, first_step)


@contextlib.contextmanager
def reporting(session: Session, folder: RunFolder, first_step: int) -> Iterator[Reporter | None]:
    """The screen and the folder's files in process 0, nothing in the others."""
    if not distributed.is_first():
        yield None
        return
    settings = session.settings
    events = folder.events if settings.tensorboard else None
    resume_step = first_step if settings.resume else None
    log = MetricsLog(folder.metrics, resume_step=resume_step, tensorboard=events)
    with log, contextlib.closing(Console(session, log, first_step)) as console:
        yield console


def is_over(folder: RunFolder, step: int, settings: Resolved) -> bool:
    """Whether a run that is to be resumed has nothing left to do, which is printed; WorkdirError if it is longer."""
    if step > settings.steps:
        raise WorkdirError(
            f"the run in {folder.path} has done {step:,} steps, more than the {settings.steps:,} asked for. "
            "Ask for more with --steps or --epochs, or use another --workdir."
        )
    over = step == settings.steps and folder.summary.exists()
    if over:
        print(f"The run in {folder.path} is finished: {step:,} of {settings.steps:,} steps. Nothing was changed.")
        if settings.schedule != "cosine":
            milestones = " ".join(map(str, settings.milestones))
            same = f", and add --milestones {milestones}" if settings.schedule == "steps" else ""
            print(f"To train for longer, ask for more --epochs or --steps{same}")
    return over


def draw(session: Session, folder: RunFolder) -> None:
    """Draws ``curves.png`` from the rows so far."""
    s = session.settings
    title = f"{s.model} on {s.dataset}, {titled(s)}"
    rows = {f"{s.method.upper()}, K = {s.K}": read_rows(folder.metrics)}
    plot_curves(rows, folder.curves, title=title, data_source=session.task.source, headline=session.task.headline)


def _close(session: Session, folder: RunFolder, outcome: Outcome, checkpoints: Checkpoints, sample: str | None) -> int:
    """Draws the curves, writes the summary, and says how the run ended."""
    draw(session, folder)
    summary = make_summary(session, outcome, sample)
    write_json(folder.summary, summary)
    if outcome.divergence is not None:
        where = outcome.divergence
        good = checkpoints.steps()
        last = f"the last good checkpoint is that of step {good[-1]}" if good else "there is no checkpoint yet"
        has_rate = "learning_rate" not in METHODS[session.settings.method].without
        hint = " A smaller --learning-rate or a smaller --K may help." if has_rate else ""
        return fail(
            f"the run diverged: {where.what} in stage {where.stage} at step {where.step}; {last}. "
            f"The curves are in {folder.curves}." + hint,
            DIVERGED,
        )
    headline, t = session.task.headline, outcome.totals
    score, best = (headline.text(t.scores[f"{prefix}test_{headline.name}"]) for prefix in ("", "best_"))
    print(
        f"Done: test {headline.words} {score} (best {best}) on {session.task.dataset} "
        f"after {outcome.step:,} steps in {t.seconds:.0f} s."
    )
    peaks = summary.get("device_peak_bytes", {})
    if peaks:
        print("Peak of memory: " + ", ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in peaks.items()))
    if sample is not None:
        show(sample)
    print(f"Curves: {folder.curves}   numbers: {folder.metrics}   summary: {folder.summary}")
    return FINISHED
