"""The folder of a run: what it holds, and whether a new run may use it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fr_jax._files import write_json
from fr_jax.training.metrics_log import read_rows

__all__ = ["RunFolder", "WorkdirError"]


SUMMARY = {"steps", "seconds", "step_seconds_median", "device", "diverged"}


class WorkdirError(ValueError):
    """The folder cannot be used for this run; the message says what to do."""


class RunFolder:
    """The files of one run.

    Attributes:
      path: the folder.
      config, metrics, curves, summary, checkpoints, profile, events: its files and folders.
      directions, directions_picture: what ``fr_jax.experiments.sufficient_direction`` measured while it went.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self.events = self.path / "tensorboard"
        self.directions = self.path / "sufficient_direction.jsonl"
        self.directions_picture = self.path / "sufficient_direction.png"

    def holds_run(self) -> bool:
        """Whether a run, finished or not, has written here."""
        return self.config.exists() or self.metrics.exists() or self.checkpoints.exists()

    def saved_config(self) -> dict[str, Any] | None:
        """The configuration of the run that the folder holds, if any.

        Raises:
          WorkdirError: config.json is not readable.
        """
        return _read_object(self.config)

    def saved_summary(self) -> dict[str, Any] | None:
        """How the run ended, if it did.

        Raises:
          WorkdirError: summary.json is not readable, or not whole.
        """
        summary = _read_object(self.summary)
        if summary is not None and not set(summary) >= SUMMARY:
            missing = ", ".join(sorted(SUMMARY - set(summary)))
            raise WorkdirError(f"{self.summary} lacks {missing}. Remove that file: continuing the run makes it again.")
        return summary

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuses to mix two runs.

        Raises:
          WorkdirError: the folder holds a run, and neither was asked for; or it is not a folder.
        """
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise WorkdirError(f"--workdir {self.path} cannot be used: {there} is not a folder. Give another.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise WorkdirError(f"--workdir {self.path} cannot be written: no permission for {there}. Give another.")
        if self.holds_run() and not (resume or overwrite):
            kind = "a finished run" if self.summary.exists() else "an unfinished run"
            raise WorkdirError(
                f"{self.path} holds {kind}, which is not overwritten. Continue it with --resume, choose another "
                "--workdir, or delete it and start again with --overwrite."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder against a second process, such as a ``--resume`` of a run that is still going.

        The lock goes with the process, however that ends. Windows has no ``flock``, and so no lock. If an error ends
        the run before it has written anything, the folders made here are removed.

        Raises:
          WorkdirError: another process holds the folder.
        """
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(self.path):
                yield
        finally:
            for path in made:
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()

    def claim(self, config: Mapping[str, Any], *, overwrite: bool) -> None:
        """Makes the folder this run's: with ``overwrite`` the old run's files go first, a summary in any case."""
        self.summary.unlink(missing_ok=True)  # it says that a run is over
        if overwrite:
            self.clear()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, config)

    def clear(self) -> None:
        """Deletes the run that the folder holds, and nothing else."""
        own = (self.summary, self.curves, self.metrics, self.directions, self.directions_picture, self.config)
        for path in own:
            path.unlink(missing_ok=True)
        for path in (self.checkpoints, self.profile, self.events):
            shutil.rmtree(path, ignore_errors=True)

    def check_same(self, config: Mapping[str, Any], differences: Callable[..., list[str]]) -> None:
        """Refuses to resume under settings that change the mathematics.

        Raises:
          WorkdirError: naming the settings that differ, or a damaged row of metrics.jsonl.
        """
        try:
            if self.metrics.exists():
                read_rows(self.metrics)
        except ValueError as error:
            raise WorkdirError(f"--resume cannot continue the metrics: {error}") from None
        saved = self.saved_config()
        if saved is None:
            return
        different = differences(saved, config)
        if different:
            raise WorkdirError(
                f"--resume cannot continue the run in {self.path} with other settings: {'; '.join(different)}. "
                "Repeat the settings of the run (they stand in its config.json), or use another --workdir."
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    # The folder itself: a lock file would be one more thing in it.
    itself = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(itself, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"another process is training in {folder}. Wait for it, stop it, or choose another --workdir."
            ) from None
        yield
    finally:
        os.close(itself)


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{path} cannot be read ({error}). Restore it, choose another --workdir, or start again with --overwrite."
        ) from None
