"""MNIST from the four official idx files, gzipped or plain.

An idx file consists of two zero bytes, the type of its elements (8: unsigned byte), the number of axes, the length of
each axis as a big-endian 32-bit integer, and the elements in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fr_jax.data._digests import not_published
from fr_jax.data._official import Arrays, OfficialData
from fr_jax.data.download import Archive, DataError

NUM_CLASSES = 10
FOLDERS = ("", "mnist", "MNIST", "MNIST/raw")  # below the folder given by a user; the last is torchvision's
GZIP_MAGIC = b"\x1f\x8b"
# The sources of torchvision and TFDS; the site of the authors, yann.lecun.com, often refuses requests.
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")


class IdxFile(NamedTuple):
    """One of the four files: its array is ``(records, 28, 28)`` or ``(records,)``, its download is gzipped.

    ``md5`` is that of the unpacked file; None is not compared.
    """

    shape: tuple[int, ...]
    archive: Archive
    md5: str | None = None

    @property
    def header(self) -> bytes:
        """The first bytes of the unpacked file; 8 is the type: unsigned bytes."""
        return struct.pack(f">HBB{len(self.shape)}I", 0, 8, len(self.shape), *self.shape)

    @property
    def size(self) -> int:
        """Bytes of the unpacked file."""
        return len(self.header) + math.prod(self.shape)


def _file(name: str, shape: tuple[int, ...], packed_md5: str, md5: str) -> IdxFile:
    url, *mirrors = (mirror + name + ".gz" for mirror in MIRRORS)
    return IdxFile(shape, Archive(url, packed_md5, tuple(mirrors)), md5)


# In the order of Arrays: MD5 of the gzipped file, and of what is in it.
FILES: dict[str, IdxFile] = {
    name: _file(name, shape, *md5)
    for name, shape, *md5 in (
        (
            "train-images-idx3-ubyte",
            (60_000, 28, 28),
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "6bbc9ace898e44ae57da46a324031adb",
        ),
        ("train-labels-idx1-ubyte", (60_000,), "d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
        (
            "t10k-images-idx3-ubyte",
            (10_000, 28, 28),
            "9fb629c4189551a2d022fa330f9573f3",
            "2646ac647ad5339dbf082846283269ea",
        ),
        ("t10k-labels-idx1-ubyte", (10_000,), "ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
    )
}


def official() -> OfficialData:
    """The description of MNIST."""
    (train_size, height, width), _, (test_size, *_), _ = (file.shape for file in FILES.values())
    return OfficialData(
        "mnist",
        "MNIST",
        (height, width, 1),
        train_size=train_size,
        test_size=test_size,
        num_classes=NUM_CLASSES,
        crop=False,
        flip=False,
        kind_of_files="idx",
        places=f"the folder with {', '.join(FILES)} (each plain or .gz), or the folder that holds it as mnist, MNIST "
        "or MNIST/raw",
        archives=tuple(file.archive for file in FILES.values()),
        find=find,
        read=read,
    )


def find(place: Path) -> Path | None:
    """The folder of idx files at, in or (if it is one of them) around ``place``, or ``None``."""
    folders = [place.parent] if place.is_file() else [place / below for below in FOLDERS]
    fullest = max(folders, key=lambda folder: len(_paths(folder)))
    return fullest if _paths(fullest) else None


def read(folder: Path) -> tuple[Arrays, tuple[str, ...]]:
    """Reads a folder with the four files, as found by :func:`find`; says which are not the published ones.

    Raises:
      DataError: a file is missing, cannot be unpacked, has the wrong type or size, or holds a label out of range.
    """
    paths = _paths(folder)
    missing = [name for name in FILES if name not in paths]
    if missing:
        urls = ", ".join(FILES[name].archive.url for name in missing)
        raise DataError(
            f"{folder} is not a complete copy of MNIST: {', '.join(missing)} missing. It must hold {', '.join(FILES)} "
            f"(each plain or .gz). Download {urls} and put it next to the others"
        )
    contents = {name: _unpacked(paths[name], file) for name, file in FILES.items()}
    train_images, train_labels, test_images, test_labels = (
        _decode(paths[name], file, contents[name]) for name, file in FILES.items()
    )
    train_labels, test_labels = train_labels.astype(np.int32), test_labels.astype(np.int32)
    different = not_published(contents, {name: file.md5 for name, file in FILES.items() if file.md5}, paths)
    return Arrays(train_images[..., None], train_labels, test_images[..., None], test_labels), different


def _paths(folder: Path) -> dict[str, Path]:
    """File name -> path, for the files present; some copies are spelled train-images.idx3-ubyte."""
    paths = {}
    for name in FILES:
        dotted = name.replace("-idx", ".idx")
        for spelling in (name + ".gz", name, dotted + ".gz", dotted):
            if (folder / spelling).is_file():
                paths[name] = folder / spelling
                break
    return paths


def _decode(path: Path, file: IdxFile, content: bytes) -> np.ndarray:
    header, axes = file.header, len(file.shape)
    problem = None
    if content[:4] != header[:4]:
        magic = content[:4].hex() or "nothing"
        problem = f"begins with {magic}; an idx file of bytes with {axes} axes begins with {header[:4].hex()}"
    elif len(content) >= len(header) and not content.startswith(header):
        lengths = struct.unpack_from(f">{axes}I", content, 4)
        problem = f"holds {_product(lengths)} numbers; it must hold {_product(file.shape)}"
    elif len(content) != file.size:
        found = f"more than {file.size:,}" if len(content) > file.size else f"{len(content):,}"
        problem = f"has {found} bytes (unpacked); it must have {file.size:,}"
    if problem is not None:
        raise DataError(f"{path} {problem}. {file.archive.again}")
    # A copy, because arrays over bytes are read-only.
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(file.shape).copy()
    wrong = np.flatnonzero(array >= NUM_CLASSES) if axes == 1 else np.empty(0)
    if wrong.size:
        label, valid = array[wrong[0]], f"0..{NUM_CLASSES - 1}"
        problem = f"record {wrong[0]} has the label {label}; MNIST has labels {valid}"
        raise DataError(f"{path}: {problem}. {file.archive.again}")
    return array


def _unpacked(path: Path, file: IdxFile) -> bytes:
    """The unpacked content, at most one byte more than expected."""
    try:
        # Some browsers unpack a download and keep the name with .gz: the first bytes decide whether it is packed.
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
        with gzip.open(path) if packed else path.open("rb") as stream:
            return stream.read(file.size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} could not be read ({error}). {file.archive.again}") from error


def _product(lengths: tuple[int, ...]) -> str:
    return " × ".join(f"{length:,}" for length in lengths)
