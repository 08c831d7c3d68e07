"""Where a measuring program leaves its results, numbers and pictures, each whole or not there; looked at beforehand."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fr_jax._files import write_atomically, write_json
from fr_jax.experiments._fields import SettingsError

__all__ = ["check_file", "check_folder", "check_picture", "write_beside", "write_results"]


def check_folder(output: Path | None, names: Iterable[str], *, overwrite: bool) -> None:
    """Makes the folder ``--output``, before anything is measured; None is none.

    Args:
      output: the folder.
      names: of the files that will be written into it.
      overwrite: whether they may be there already.

    Raises:
      SettingsError: it cannot be made or written, or holds one of the files.
    """
    if output is not None:
        _check(output, output, "a folder", names, overwrite)


def check_file(output: Path | None, *, overwrite: bool, picture: bool = True) -> None:
    """The same for a JSON file ``--output`` and the ``picture`` beside it, which gets its name with .png.

    Raises:
      SettingsError: its name does not end in .json, its folder cannot be made or written, or one of the two is there.
    """
    if output is None:
        return
    beside = ", and the picture gets the same with .png" if picture else ""
    if output.suffix != ".json" or output.is_dir():
        what = "is a folder" if output.is_dir() else "does not end in .json"
        raise SettingsError(
            f"--output {output} {what}; it must be the name of a JSON file{beside}. "
            f"Try --output {output / 'result.json' if output.is_dir() else f'{output}.json'}."
        )
    names = (output.name, *([output.with_suffix(".png").name] if picture else ()))
    _check(output, output.parent, "in a folder", names, overwrite)


def check_picture(output: Path, also: Iterable[str], *, overwrite: bool) -> None:
    """The same for a picture ``--output``, and files beside it with its name and the endings ``also``.

    Raises:
      SettingsError: its name does not end in .png, its folder cannot be made or written, or one of the files is there.
    """
    if output.suffix != ".png" or output.is_dir():
        what = "is a folder" if output.is_dir() else "does not end in .png"
        raise SettingsError(
            f"--output {output} {what}; it must be the name of a PNG file. "
            f"Try --output {output / 'comparison.png' if output.is_dir() else f'{output}.png'}."
        )
    names = (output.name, *(output.with_suffix(ending).name for ending in also))
    _check(output, output.parent, "in a folder", names, overwrite)


def _check(output: Path, folder: Path, what: str, names: Iterable[str], overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--output {output} cannot be {what}: {error.strerror}. Choose another.") from error
    if not os.access(folder, os.W_OK):
        raise SettingsError(f"--output {output} cannot be written: {folder} does not let you. Choose another.")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise SettingsError(f"{folder} has {', '.join(there)} already. Add --overwrite, or choose another --output.")


def write_beside(output: Path, result: Any, picture: bytes) -> None:
    """Writes the JSON file ``--output``, and the picture beside it.

    Raises:
      OSError: one cannot be written.
    """
    write_json(output, result)
    write_atomically(output.with_suffix(".png"), picture)


def write_results(output: Path, files: Mapping[str, Any]) -> int:
    """Writes each file by its name into the folder, made if need be: bytes as they are, everything else as JSON.

    Returns:
      The program's exit code: 0, or 1 where a file cannot be written, which is said.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                write_atomically(output / name, content)
            else:
                write_json(output / name, content)
    except OSError as error:
        print(f"fr_jax: the results were not written: {error}", file=sys.stderr)
        return 1
    return 0
