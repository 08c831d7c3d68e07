"""The log of a run: ``metrics.jsonl``, one JSON object per line, and TensorBoard events if asked for."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fr_jax._files import explained, plain, write_atomically


class MetricsLog:
    """Appends rows to a JSON Lines file; a row is on its way to the disk when ``write`` returns.

    The file is strict JSON: numbers that are not finite are written as ``null``.

    Args:
      path: the file; its folder is made.
      resume_step: rows of later steps are dropped first, since the resumed run writes them again, and so is a last line
        that a killed run left half written. ``None`` starts a new log.
      tensorboard: a folder for TensorBoard events of the same rows.

    Raises:
      FileExistsError: ``resume_step`` is None and the file has rows already.
      ImportError: ``tensorboard`` is given and tensorboardX is not installed.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> with MetricsLog(path) as log:
      ...     log.write({"step": 1, "train_loss": float("nan")})
      >>> read_rows(path)
      [{'step': 1, 'train_loss': None}]
    """

    def __init__(
        self, path: str | pathlib.Path, resume_step: int | None = None, *, tensorboard: str | pathlib.Path | None = None
    ) -> None:
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        exists = self._path.exists() and self._path.stat().st_size > 0
        if exists and resume_step is None:
            raise FileExistsError(
                f"{self._path} holds the rows of another run: resume that run, or use another folder."
            )
        if exists:
            rows = [row for row in read_rows(self._path) if row.get("step", 0) <= resume_step]
            write_atomically(self._path, b"".join(map(_line, rows)))
        self._events = None if tensorboard is None else _tensorboard_writer(tensorboard, resume_step)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (closed by close)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Args:
          row: names and numbers (Python, NumPy or JAX scalars), with ``"step"`` among them.

        Raises:
          OSError: the row cannot be written (the message says so when the disk is full); the file is as before.
        """
        before = os.fstat(self._file.fileno()).st_size
        try:
            line = _line(row)
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # half a row would make the file unreadable
                self._file.truncate(before)
            raise explained(error, self._path) from error
        if self._events is not None:
            for name, value in row.items():
                if name not in ("step", "epoch") and isinstance(plain(value), int | float):
                    self._events.add_scalar(_tag(name), plain(value), row["step"])

    def close(self) -> None:
        """Closes the file and the TensorBoard events."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that was only half written is left out.

    Raises:
      ValueError: a line before the last is not a JSON object.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"line {number} of {path} is damaged ({error}): {line[:60]!r}. Remove it, or start in another folder."
            ) from None
        rows.append(row)
    return rows


def _tensorboard_writer(directory: str | pathlib.Path, resume_step: int | None) -> Any:
    """A ``tensorboardX.SummaryWriter``; events of steps after ``resume_step`` are hidden."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard events need the package tensorboardX: pip install 'fr_jax[tensorboard]', or run without them."
        ) from error
    return SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1, flush_secs=10)


def _tag(name: str) -> str:
    """``train_loss`` -> ``train/loss``, so that TensorBoard groups training and test; ``gradient_norm/1`` stays."""
    for group in ("train", "test"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return name if "/" in name else f"run/{name}"


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(row), allow_nan=False, ensure_ascii=False).encode() + b"\n"
