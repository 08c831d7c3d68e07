"""Checkpoints of everything in flight, written by orbax: atomic, verified, and readable by name."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fr_jax import distributed
from fr_jax._files import free_space, is_disk_full, rename_free
from fr_jax.training._orbax import quiet_orbax
from fr_jax.training._saved_state import (
    CheckpointError,
    Damaged,
    array_names,
    check_arrays,
    check_fit,
    check_index,
    pack,
    some,
    unpack,
)
from fr_jax.types import PyTree

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

# orbax.checkpoint is imported where it is used: it adds 0.2 to 0.4 s to every start, `--help` included.

_UNFINISHED = ".orbax-checkpoint-tmp"


class Restored(NamedTuple):
    """What :meth:`Checkpoints.restore` found.

    Attributes:
      state: a pytree with the structure and the placement of the template.
      metadata: what was given to ``save``, as JSON gives it back (tuples are lists).
      step: the step of the checkpoint.
    """

    state: PyTree
    metadata: dict[str, Any]
    step: int


class Checkpoints:
    """The newest ``keep`` checkpoints of a run, in one folder per step.

    A state is stored as a flat dictionary of readable names (``"params/0/Conv_0/kernel"``), so a file does not depend
    on Python classes. Each leaf carries a checksum. Only ``save`` changes the folder; ``restore`` and ``steps`` read.
    Room for ``keep + 1`` checkpoints is needed: the oldest is deleted only when the newest is complete. Saving and
    restoring each cost about half a millisecond per leaf, whatever its size. In a run of several processes all must
    call ``save`` and ``restore``; process 0 reads and writes the folder, and the others do not need it.

    Args:
      directory: the folder, made by the first ``save``.
      keep: how many checkpoints to keep, at least 1. With 2, a damaged newest one loses one interval of work.
      warn: called with one readable line for each damaged or unfinished checkpoint met.

    Raises:
      ValueError: for ``keep`` below 1.

    Example:
      >>> import tempfile
      >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     checkpoints.save(3, {"step": 3}, {"seed": 0})
      ...     checkpoints.restore({"step": 0})
      Restored(state={'step': 3}, metadata={'seed': 0}, step=3)
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 2, warn: Callable[[str], None] = print) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must be kept; give keep=1 or more.")
        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._warn = warn
        self._manager: Any = None
        self._damaged: set[int] = set()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases orbax's manager; a later ``save`` or ``restore`` opens it again."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with quiet_orbax():
                manager.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints in the folder, oldest first, unverified."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Writes a checkpoint and returns when it is complete: nothing of ``state`` is read after that.

        A checkpoint of the same step is replaced once the new one is complete. Checkpoints that ``restore`` found
        damaged are moved aside to ``damaged-<step>``, because they must not count among the ``keep`` newest.

        Args:
          step: the number of steps done, at least 0.
          state: any pytree of arrays, typed keys, numbers, booleans and strings.
          metadata: what else a later run needs to know, as JSON.

        Raises:
          CheckpointError: disk full or not writable (what was written is removed, earlier checkpoints are intact), a
            leaf that cannot be stored, or newer checkpoints that no ``restore`` of this object found damaged.
          TypeError: for metadata that JSON cannot hold.
        """
        arrays, index = pack(step, state, metadata)
        distributed.group().from_first(lambda: self._save(step, arrays, index))

    def _save(self, step: int, arrays: dict[str, np.ndarray], index: dict[str, Any]) -> None:
        newer = [known for known in self.steps() if known > step and known not in self._damaged]
        if newer:
            raise CheckpointError(
                f"{self.directory} already holds checkpoints of later steps ({some(newer)}) than step {step}: "
                "restore the newest first, or save to another folder."
            )
        replaced = self.directory / f"replaced-{step}"
        try:
            self._clear_the_way(step, replaced)
            self._write(step, arrays, index)
        except Exception as error:
            self._undo(step, replaced)
            size = sum(array.nbytes for array in arrays.values())
            raise CheckpointError(self._why_not_written(step, size, error)) from error
        shutil.rmtree(replaced, ignore_errors=True)

    def restore(self, template: PyTree, only: Sequence[str] = ()) -> Restored | None:
        """Reads the newest checkpoint whose checksums hold.

        Args:
          template: a state with the structure, shapes and dtypes of the one saved (a fresh one of ``init``). Arrays
            come back where the template's arrays are, NumPy arrays and Python numbers as such.
          only: fields of the state to read, such as ``("params", "model_state")``; all without it. The others need not
            be those of the checkpoint, and come back as the template has them.

        Returns:
          The state, or None if there is no checkpoint.

        Raises:
          CheckpointError: all checkpoints are damaged, or a sound one does not fit the template.
        """
        read: list[Any] = []

        def find() -> list[Any]:
            read.extend(self._newest(template, only) or ())
            return read[:2]

        if not (found := distributed.group().from_first(find)):
            return None
        step, index = found
        return Restored(unpack(index, read[2] if read else {}, template, only), index["metadata"], step)

    def _newest(
        self, template: PyTree, only: Sequence[str]
    ) -> tuple[int, dict[str, Any], dict[str, np.ndarray]] | None:
        """Step, index and arrays of the newest checkpoint that holds."""
        steps = self.steps()
        self._name_leftovers()
        for at in reversed(range(len(steps))):
            step = steps[at]
            try:
                return step, *self._load(step, template, only)
            except Damaged as damage:
                self._damaged.add(step)
                then = f"trying the one of step {steps[at - 1]}" if at else "there is none before it"
                self._warn(f"The checkpoint of step {step} in {self.directory} is damaged ({damage}); {then}.")
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.directory} (steps {some(steps)}) is damaged, so there is nothing to resume "
                "from. Nothing was deleted; start again in another folder."
            )
        return None

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            several: dict[str, Any] = {}
            if distributed.group().size > 1:  # or orbax waits for the others, who do not come
                alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="0")
                several = {"multiprocessing_options": alone, "create": False}
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, enable_async_checkpointing=False, lightweight_initialize=True, **several
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _write(self, step: int, arrays: dict[str, np.ndarray], index: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        items: dict[str, Any] = {"index": ocp.args.JsonSave(index)}
        if arrays:
            items["state"] = ocp.args.StandardSave(arrays)
        with quiet_orbax():
            manager = self._open()
            manager.save(step, args=ocp.args.Composite(**items), force=True)
            manager.wait_until_finished()

    def _load(self, step: int, template: PyTree, only: Sequence[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        import orbax.checkpoint as ocp

        try:
            index = check_index(self._read(step, index=ocp.args.JsonRestore()).index)
            check_fit(index, template, only)
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} cannot be used: {error}"
            ) from None
        arrays = self._read(step, state=ocp.args.StandardRestore()).state if array_names(index) else {}
        check_arrays(index, arrays)
        return index, arrays

    def _read(self, step: int, **items: Any) -> Any:
        import orbax.checkpoint as ocp

        try:
            with quiet_orbax():
                return self._open().restore(step, args=ocp.args.Composite(**items))
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:
            raise Damaged(_one_line(error)) from error

    def _name_leftovers(self) -> None:
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            if path.name.endswith(_UNFINISHED):
                step = path.name.removesuffix(_UNFINISHED)
                self._warn(f"The checkpoint of step {step} in {self.directory} was never finished; it is not used.")
            elif path.name.startswith("replaced-"):
                self._warn(f"{path} was about to be replaced when the program was killed; it is not used.")

    def _clear_the_way(self, step: int, replaced: pathlib.Path) -> None:
        """Moves aside what must not be counted or overwritten; deletes only what was never finished."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(path)
        for damaged in sorted(self._damaged & set(self.steps())):
            rename_free(self.directory / str(damaged), f"damaged-{damaged}")
            self.close()
        self._damaged.clear()
        if step in self.steps():
            if replaced.exists():  # left by a program that was killed here
                rename_free(replaced, replaced.name)
            (self.directory / str(step)).rename(replaced)
            self.close()

    def _undo(self, step: int, replaced: pathlib.Path) -> None:
        """Leaves the checkpoints that can be restored as they were before a save that failed."""
        with contextlib.suppress(Exception):
            self.close()
        self._manager = None
        shutil.rmtree(self.directory / f"{step}{_UNFINISHED}", ignore_errors=True)
        with contextlib.suppress(OSError):
            if replaced.exists() and step not in self.steps():
                replaced.rename(self.directory / str(step))

    def _why_not_written(self, step: int, size: int, error: Exception) -> str:
        steps = self.steps()
        earlier = f"the earlier checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        what = f"the checkpoint of step {step} ({size / 1e6:.1f} MB) could not be written to {self.directory}"
        if not is_disk_full(error):
            return f"{what}: {_one_line(error)}; {earlier}."
        removed = f"{free_space(self.directory)} after removing what was written of it"
        return f"disk full: {what}, {removed}; {earlier}. Free some space, then resume."


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    short = text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"  # tensorstore's reason comes last
    return f"{type(error).__name__}: {short}"
