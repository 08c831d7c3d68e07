"""Text as bytes, memory-mapped: the sources of Python's standard library, or the user's own files.

Example:
  >>> from fr_jax.data import text
  >>> corpus = text.load(files=[text.__file__])  # without files: Python's standard library
  >>> corpus.train.windows([3], 4).tobytes()
  b'Text'
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fr_jax.data import _standard_library, _text_files
from fr_jax.data._text_files import Piece
from fr_jax.data.download import DataError

__all__ = ["CORPORA", "Corpus", "Text", "load"]

CORPORA = ("auto", "python", "text")
HELD_OUT = (0.05, 0.10)  # least and most, of all bytes
LARGEST = (0.01, 0.10)  # file to hold out, of all bytes: one large file would stand for all others
LEAST_FILES = 10  # of which some are held out whole

Log = Callable[[str], Any]


class Text:
    """A sequence of bytes that lies in pieces of files; these are mapped where they are read, and never copied whole.

    A file that is cut short while it is mapped ends the process (SIGBUS): write to another one instead.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(piece for piece in pieces if piece.stop > piece.start)
        self._ends = np.cumsum([piece.stop - piece.start for piece in self.pieces], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """The bytes from each of the ``starts`` on, which are at most ``len(self) - length``: uint8 ``(N, length)``."""
        found = np.empty((len(starts), length), np.uint8)
        for row, start in zip(found, starts, strict=True):
            self._read(int(start), row)
        return found

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fills ``out`` from ``start`` on; a window may span several pieces."""
        i = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < len(out):
            piece = self.pieces[i]
            before_end = int(self._ends[i]) - (start + done)
            count = min(len(out) - done, before_end)
            out[done : done + count] = _mapped(piece.path)[piece.stop - before_end : piece.stop - before_end + count]
            done, i = done + count, i + 1


@functools.lru_cache(maxsize=1024)  # the system limits how many a process may have
def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, mode="r")


class Corpus(NamedTuple):
    """Text to train on, and text to test on.

    Attributes:
      name: ``"python"``, or ``"text"`` for the user's own.
      source: one line of text: which data these are, and where they came from.
      train, held_out: the bytes.
      checksum: CRC32 of all files in order.
      prompt: what a sample of a model trained on it may begin with.
    """

    name: str
    source: str
    train: Text
    held_out: Text
    checksum: int
    prompt: str


def load(name: str = "auto", files: Sequence[str | Path] = (), *, log: Log = print) -> Corpus:
    """Loads text by name; nothing is downloaded.

    ``python`` is the source code, with its documentation strings, of the standard library of the Python that runs:
    without tests and installed packages, every different file once. It is joined once, into the user's cache folder
    (``$FR_JAX_CACHE``). ``text`` are ``files``: UTF-8 files, and folders, which are searched recursively in sorted
    order for those that are not hidden. ``auto`` is ``text`` if there are files, else ``python``.

    5 to 10 % of the bytes are held out: whole files, chosen by a hash of their names, if there are at least 10;
    otherwise the end of the text. ``log`` receives each line for the user, such as files that were skipped.

    Raises:
      DataError: the name is unknown or does not go with ``files``; a file that was given by name cannot be read or is
        not UTF-8; a folder has no text; the cache folder cannot be written.

    Example:
      >>> from fr_jax.data import text
      >>> corpus = text.load(files=[text.__file__])
      >>> 0.05 < len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) < 0.1
      True
    """
    if name not in CORPORA:
        raise DataError(
            f"there is no text {name!r}. Valid names: {', '.join(CORPORA)}; give files of your own by --text."
        )
    if name == "python" and files:
        raise DataError("--dataset python was given with --text; drop one of them.")
    if name == "text" and not files:
        raise DataError(
            "--dataset text needs files: add --text FILE OR FOLDER. --dataset python is text that needs none."
        )
    return _given([Path(file) for file in files], log) if files else _python(log)


def held_out_files(sizes: Mapping[str, int]) -> set[str]:
    """Names of files with 5 to 10 % of all bytes, in order of a hash of the name; empty if that cannot be.

    Example:
      >>> from fr_jax.data.text import held_out_files
      >>> sorted(held_out_files({f"{i}.txt": 100 for i in range(20)}))
      ['1.txt']
    """
    total = sum(sizes.values())
    in_order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    for largest in LARGEST:
        found, taken = set(), 0
        for name in in_order:
            if taken >= HELD_OUT[0] * total:
                return found
            if sizes[name] <= largest * total and taken + sizes[name] <= HELD_OUT[1] * total:
                found.add(name)
                taken += sizes[name]
    return set()


def _python(log: Log) -> Corpus:
    train, held_out, checksum = _standard_library.joined(held_out_files, log)
    whole, rest = (Text([Piece(path, 0, path.stat().st_size)]) for path in (train, held_out))
    title = f"source code of Python's standard library ({_standard_library.version()})"
    source = f"{title}: {len(whole):,} training and {len(rest):,} held-out bytes"
    return Corpus("python", source, whole, rest, checksum, prompt="def ")


def _given(paths: Sequence[Path], log: Log) -> Corpus:
    files, checksum = _text_files.find(paths, log)
    sizes = {file.name: file.size for file in files}
    chosen = held_out_files(sizes) if len(files) >= LEAST_FILES else set()
    whole = Text([Piece(file.path, 0, file.size) for file in files])
    if chosen:
        train, held_out = (
            Text([Piece(file.path, 0, file.size) for file in files if (file.name in chosen) is wanted])
            for wanted in (False, True)
        )
        how = f"{len(chosen)} of {len(files)} files"
    else:
        train, held_out = _split(whole, len(whole) - round(sum(HELD_OUT) / 2 * len(whole)))
        how = f"the end of {'the file' if len(files) == 1 else f'{len(files)} files'}"
    where = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    source = f"text: {len(train):,} training and {len(held_out):,} held-out bytes ({how}) from {where}"
    return Corpus("text", source, train, held_out, checksum, prompt="\n")


def _split(text: Text, place: int) -> tuple[Text, Text]:
    """The bytes before and from ``place`` on."""
    parts: tuple[list[Piece], list[Piece]] = ([], [])
    for piece in text.pieces:
        cut = min(max(piece.start, piece.start + place), piece.stop)
        parts[0].append(piece._replace(stop=cut))
        parts[1].append(piece._replace(start=cut))
        place -= piece.stop - piece.start
    return Text(parts[0]), Text(parts[1])
