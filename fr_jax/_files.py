"""Atomic writes, JSON among them, and errors that state when a disk is full."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any


def write_atomically(path: str | pathlib.Path, data: bytes) -> None:
    """Writes ``data`` to a temporary file next to ``path``, then renames it: readers see the old file or the new one.

    Raises:
      OSError: the file cannot be written (with :func:`explained`'s message if the disk is full); ``path`` is unchanged.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a crash after the rename can leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def explained(error: OSError, path: pathlib.Path) -> OSError:
    """The same error, with a readable message if the disk is full."""
    if not is_disk_full(error):
        return error
    return OSError(error.errno, f"disk full ({free_space(path.parent)}); {path.name} is unchanged. Free some space")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` or its cause is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # tensorstore states it only in the message.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_space(directory: pathlib.Path) -> str:
    """The free space on the disk of ``directory``, in words."""
    try:
        return f"free {shutil.disk_usage(directory).free / 1e6:.1f} MB on the disk of {directory}"
    except OSError as error:
        return f"the free space of {directory} is unknown: {error.strerror}"


def rename_free(path: pathlib.Path, name: str) -> pathlib.Path:
    """Renames within the folder to ``name``, or to ``name-2``, ``name-3``, ... if that is taken."""
    target, number = path.with_name(name), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{name}-{number}")
    return path.rename(target)


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """:func:`write_atomically` of indented JSON, with array scalars as numbers; NaN and infinity become ``null``."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def plain(value: Any) -> Any:
    """The same in terms of JSON: array scalars as numbers, what is not finite as ``None``."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
