"""Several training runs, one after another, each in a folder of its own; what is finished is not repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from fr_jax.experiments._cli.checks import differences
from fr_jax.experiments._cli.command_line import Program
from fr_jax.experiments._cli.devices import request_devices
from fr_jax.experiments._cli.harness import DIVERGED, FINISHED
from fr_jax.experiments._cli.settings import TrainSettings, as_json
from fr_jax.experiments._run import program
from fr_jax.experiments._run.session import make_layers
from fr_jax.experiments._run.tasks import Data, resolve_for
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.run_folder import RunFolder, WorkdirError

__all__ = ["is_finished", "train_all"]


def train_all(
    runs: Mapping[str, TrainSettings],
    home: Path,
    data: Data,
    *,
    caller: str,
    again: str,
    overwrite: bool = False,
    report: Callable[[], object] = lambda: None,
) -> int:
    """Trains runs in this process -> 0 (also after divergences), or the code of the run that failed or was stopped.

    ``runs`` has checked settings by the names of the runs' folders in ``home``, in order. Finished ones are skipped, a
    stopped one goes on; ``overwrite`` deletes them first, all at once: what is stopped later must not leave old runs
    behind. ``again`` is the command that continues; ``report`` is called after each run. Raises as ``program.run``.
    """
    request_devices(max(s.devices or s.K * s.data_parallel for s in runs.values()))
    folders = {name: RunFolder(home / name) for name in runs}
    for name, settings in runs.items():  # errors come before anything is trained
        make_layers(resolve_for(settings, data), data)
        folders[name].check_free(resume=True, overwrite=True)
    if overwrite:
        for folder in folders.values():
            with folder.locked():
                folder.clear()
    over = {name for name, settings in runs.items() if is_finished(folders[name], settings, data)}
    this = Program(caller, data.name, TrainSettings())
    with StopRequest() as stop:
        for number, (name, settings) in enumerate(runs.items(), start=1):
            print(f"[{number}/{len(runs)}] {name}{' is finished already.' * (name in over)}", flush=True)
            if name in over:
                continue
            folder = folders[name]
            # A comparison of which a run was stopped is given again as it was: no --resume is needed.
            placed = dataclasses.replace(settings, dataset=data.name, workdir=folder.path, resume=folder.holds_run())
            code = program.run(this, placed, data=data, again=again, stop=stop)
            report()
            if code not in (FINISHED, DIVERGED):
                return code
            if stop.signal is not None:
                print(f"Stopped after {name}; everything is saved. Continue with\n  {again}")
                return stop.exit_code
            print()
    return FINISHED


def is_finished(folder: RunFolder, settings: TrainSettings, data: Data) -> bool:
    """Whether the folder holds this very run, finished; a WorkdirError if it holds another, or a longer one."""
    saved = folder.saved_config()
    if saved is None:
        return False
    resolved = resolve_for(settings, data)
    expected = as_json(resolved) | {"resolved_cuts": saved.get("resolved_cuts")}
    different = differences(saved, expected)
    if different:
        raise WorkdirError(
            f"{folder.path} holds a run with other settings: {'; '.join(different)}. Repeat its settings, use another "
            "--workdir, or start again with --overwrite."
        )
    summary, steps = folder.saved_summary(), resolved.steps
    if summary is not None and summary["steps"] > steps:
        raise WorkdirError(
            f"{folder.path} holds a run of {summary['steps']:,} steps, more than the {steps:,} asked for. Ask for as "
            "many with --steps or --epochs, or use another --workdir."
        )
    return summary is not None and (summary["diverged"] or summary["steps"] == steps)
