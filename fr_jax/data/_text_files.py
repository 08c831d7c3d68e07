"""The user's text files: found in folders, and read through once, in parts, to see that they are UTF-8."""

from __future__ import annotations

import codecs
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fr_jax.data.download import DataError

__all__ = ["Piece", "TextFile", "find"]

PART = 1 << 20
NAMED = 5  # of the files that were skipped


class Piece(NamedTuple):
    """Bytes ``start`` to ``stop`` of a file."""

    path: Path
    start: int
    stop: int


class TextFile(NamedTuple):
    """A file that is UTF-8 throughout; ``name`` is its place below what was given."""

    path: Path
    name: str
    size: int


def find(paths: Sequence[Path], log: Callable[[str], Any]) -> tuple[list[TextFile], int]:
    """The text files among ``paths`` and in folders among them, in order, each once; and the CRC32 of all of them.

    Hidden files and folders are left out. Files in folders that cannot be used are skipped, which is logged.

    Raises:
      DataError: a path does not exist, or is a file that cannot be used; there is no text.
    """
    found: dict[Path, TextFile] = {}
    skipped: list[str] = []
    checksum = 0
    for path in (given.expanduser() for given in paths):
        if not path.exists():
            raise DataError(f"--text {path} does not exist. Give UTF-8 text files, or folders that hold some.")
        for file in _below(path) if path.is_dir() else [path]:
            real = file.resolve()
            if real in found:
                continue
            try:
                size, checksum = _read_through(file, checksum)
            except (OSError, UnicodeDecodeError) as error:
                why = _reason(error)
                if file == path:
                    advice = "Give text files in UTF-8; iconv -t UTF-8 converts others."
                    raise DataError(f"--text {path} {why}. {advice}") from error
                skipped.append(f"{file} {why}")
            else:
                name = str(file.relative_to(path)) if path.is_dir() else file.name
                found[real] = TextFile(real, name, size)
    if skipped:
        more = f"; and {len(skipped) - NAMED:,} more" if len(skipped) > NAMED else ""
        log(f"Skipped {len(skipped):,} files: {'; '.join(skipped[:NAMED])}{more}.")
    if not any(file.size for file in found.values()):
        raise DataError(
            f"--text {' '.join(map(str, paths))} has no text: {len(found):,} UTF-8 files were found, all empty. Give "
            "text files in UTF-8, or folders that hold some."
        )
    return _distinct(found.values()), checksum


def _distinct(files: Any) -> list[TextFile]:
    """With names that differ: files of two folders may have the same."""
    named: dict[str, TextFile] = {}
    for file in files:
        name, number = file.name, 1
        while name in named:
            number += 1
            name = f"{file.name} ({number})"
        named[name] = file._replace(name=name)
    return list(named.values())


def _below(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and path.is_file():  # neither a pipe nor a link to nothing
                yield path


def _read_through(path: Path, checksum: int) -> tuple[int, int]:
    """The size, and the checksum that goes on; UnicodeDecodeError with the place in the file."""
    if not path.is_file():
        raise OSError(None, "is neither a file nor a folder")
    decoder, size = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as stream:
        while part := stream.read(PART):
            _decode(decoder, part, size)
            checksum, size = zlib.crc32(part, checksum), size + len(part)
    _decode(decoder, b"", size, final=True)
    return size, checksum


def _decode(decoder: codecs.IncrementalDecoder, part: bytes, before: int, final: bool = False) -> None:
    waiting = len(decoder.getstate()[0])  # bytes of a character that began in the part before
    try:
        decoder.decode(part, final)
    except UnicodeDecodeError as error:
        error.reason = f"byte {before - waiting + error.start:,} is {error.object[error.start]:#04x}"
        raise


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 ({error.reason})"
    return str(error.strerror) if error.errno is None else f"cannot be read ({error.strerror})"
