"""The folder in which a measuring program leaves its results: numbers and pictures, each whole or not there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fr_jax.training.files import write_atomically
from fr_jax.training.metrics import write_json

__all__ = ["no_folder", "write_results"]


def no_folder(output: Path) -> str | None:
    """Makes the folder; what is wrong with it, or None."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--output {output} cannot be a folder: {error.strerror}."
    return None


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
