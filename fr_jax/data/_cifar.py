"""CIFAR-10 and CIFAR-100 from the official binary files, or directly from their ``.tar.gz``.

A record is one label byte (CIFAR-100: a coarse label, then a fine one) and 3,072 bytes of pixels: the red, green and
blue planes, row by row. Nothing is unpickled, and nothing is written to disk.
"""

from __future__ import annotations

import functools
import math
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from fr_jax.data._official import Arrays, OfficialData
from fr_jax.data.download import Archive, DataError

IMAGE_SHAPE = (32, 32, 3)
PIXELS = math.prod(IMAGE_SHAPE)
TORONTO = "https://www.cs.toronto.edu/~kriz/"


class Format(NamedTuple):
    """The file layout of one of the two data sets.

    ``train_files`` and ``test_files`` are file name -> number of records, ``folder`` is their folder in the archive. A
    record has ``label_bytes`` before its pixels, the last of which is the label.
    """

    title: str
    folder: str
    train_files: Mapping[str, int]
    test_files: Mapping[str, int]
    label_bytes: int
    num_classes: int
    archive: Archive

    @property
    def files(self) -> dict[str, int]:
        """File name -> its exact size in bytes."""
        record = self.label_bytes + PIXELS
        return {name: records * record for name, records in {**self.train_files, **self.test_files}.items()}


FORMATS: dict[str, Format] = {
    "cifar10": Format(
        title="CIFAR-10",
        folder="cifar-10-batches-bin",
        train_files={f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        test_files={"test_batch.bin": 10_000},
        label_bytes=1,
        num_classes=10,
        archive=Archive(TORONTO + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    ),
    "cifar100": Format(
        title="CIFAR-100",
        folder="cifar-100-binary",
        train_files={"train.bin": 50_000},
        test_files={"test.bin": 10_000},
        label_bytes=2,
        num_classes=100,
        archive=Archive(TORONTO + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    ),
}


def official(name: str) -> OfficialData:
    """The description of ``name``, one of ``FORMATS``."""
    layout = FORMATS[name]
    archive = layout.archive.file_name
    return OfficialData(
        name,
        layout.title,
        IMAGE_SHAPE,
        train_size=sum(layout.train_files.values()),
        test_size=sum(layout.test_files.values()),
        num_classes=layout.num_classes,
        crop=True,
        flip=True,
        kind_of_files="binary",
        places=f"the folder with {', '.join(layout.files)}, its parent, {archive} or the folder that holds it",
        archives=(layout.archive,),
        find=functools.partial(find, layout),
        read=functools.partial(read, layout),
    )


def find(layout: Format, place: Path) -> Path | None:
    """The folder of ``.bin`` files or the archive at or in ``place``, or ``None``."""
    if place.is_file():
        return place
    for folder in (place, place / layout.folder):
        if any((folder / name).is_file() for name in layout.files):
            return folder
    archive = place / layout.archive.file_name
    return archive if archive.is_file() else None


def read(layout: Format, place: Path) -> Arrays:
    """Reads a folder of ``.bin`` files, or their archive, as found by :func:`find`.

    Raises:
      DataError: a file is missing, cannot be read, has the wrong size, or holds a label out of range.
    """
    contents = _read_folder(layout, place) if place.is_dir() else _read_archive(layout, place)
    missing = [name for name in layout.files if name not in contents]
    if missing:
        raise DataError(
            f"{place} is not a complete copy of {layout.title}: {', '.join(missing)} missing. It must hold "
            f"{', '.join(layout.files)}. Unpack {layout.archive.url} again, or pass that archive itself"
        )
    # Popped, so that the pixels are not in memory twice.
    train = [_decode(layout, place, name, contents.pop(name)) for name in layout.train_files]
    test = [_decode(layout, place, name, contents.pop(name)) for name in layout.test_files]
    return Arrays(*_concatenate(train), *_concatenate(test))


def _read_folder(layout: Format, folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in layout.files if (folder / name).is_file()}
    except OSError as error:
        path = error.filename or folder
        raise DataError(f"{path} cannot be read: {error.strerror}. Make it readable, or use another copy") from error


def _read_archive(layout: Format, path: Path) -> dict[str, bytes]:
    """The contents of the expected members, by name; all other members are skipped."""
    contents: dict[str, bytes] = {}
    try:
        # A stream, read once from the front: seeking back in a gzip file would unpack it again from the start.
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                *parents, name = PurePosixPath(member.name).parts or ("",)
                if name not in layout.files or parents not in ([], [layout.folder]) or name in contents:
                    continue
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None:
                    raise DataError(f"{path}: {member.name} is not a plain file. {layout.archive.again}")
                contents[name] = stream.read()
                if len(contents) == len(layout.files):
                    break
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is not a readable .tar.gz archive ({error}). {layout.archive.again}") from error
    return contents


def _decode(layout: Format, place: Path, name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    expected, record = layout.files[name], layout.label_bytes + PIXELS
    if len(content) != expected:
        raise DataError(
            f"{place}: {name} has {len(content):,} bytes; it must have {expected:,} ({expected // record:,} records of "
            f"{record:,}). {layout.archive.again}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, layout.label_bytes - 1].astype(np.int32)
    wrong = np.flatnonzero(labels >= layout.num_classes)
    if wrong.size:
        raise DataError(
            f"{place}: record {wrong[0]} of {name} has the label {labels[wrong[0]]}; {layout.title} has labels "
            f"0..{layout.num_classes - 1}. {layout.archive.again}"
        )
    return records[:, layout.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _concatenate(files: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*files, strict=True)
    # The planes of a record are transposed: without a copy NumPy would keep that order in memory.
    return np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels)
