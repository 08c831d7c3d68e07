"""CIFAR-10 and CIFAR-100 from the official binary or Python files, or directly from their ``.tar.gz``.

A record is one label byte (CIFAR-100: a coarse label, then a fine one) and 3,072 bytes of pixels: the red, green and
blue planes, row by row. The Python files are pickles: only those that were published are read, and no code of theirs is
run. Nothing is written to disk.
"""

from __future__ import annotations

import functools
import gzip
import math
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fr_jax.data._cifar_pickles import read_pickle
from fr_jax.data._digests import not_published
from fr_jax.data._official import Arrays, OfficialData
from fr_jax.data.download import Archive, DataError

IMAGE_SHAPE = (32, 32, 3)
PIXELS = math.prod(IMAGE_SHAPE)
TORONTO = "https://www.cs.toronto.edu/~kriz/"
GZIP_MAGIC = b"\x1f\x8b"


class Format(NamedTuple):
    """The file layout of one of the two data sets.

    ``train_files`` and ``test_files`` are file name -> number of records, ``folder`` is their folder in the archive. A
    record has ``label_bytes`` before its pixels, the last of which is the label. ``python_archive`` is the same in the
    Python version, whose files are named without ``.bin``. ``digests`` are those of the files of both.
    """

    title: str
    folder: str
    train_files: Mapping[str, int]
    test_files: Mapping[str, int]
    label_bytes: int
    num_classes: int
    archive: Archive
    python_folder: str
    python_archive: Archive
    digests: Mapping[str, str]

    @property
    def files(self) -> dict[str, int]:
        """File name -> its exact size in bytes."""
        record = self.label_bytes + PIXELS
        return {name: records * record for name, records in {**self.train_files, **self.test_files}.items()}

    @property
    def pickles(self) -> dict[str, int]:
        """Name of a Python file -> the most bytes that it can have: 9 for a label, 100 for the name of an image."""
        counts = {**self.train_files, **self.test_files}
        return {name.removesuffix(".bin"): count * (PIXELS + 200) + 10_000 for name, count in counts.items()}


# SHA-1 of the binary files as in MXNet, MD5 of the Python files as in torchvision; the authors give those of archives.
FORMATS: dict[str, Format] = {
    "cifar10": Format(
        title="CIFAR-10",
        folder="cifar-10-batches-bin",
        train_files={f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        test_files={"test_batch.bin": 10_000},
        label_bytes=1,
        num_classes=10,
        archive=Archive(TORONTO + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        python_folder="cifar-10-batches-py",
        python_archive=Archive(TORONTO + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        digests={
            "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
            "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
            "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
            "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
            "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
            "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": Format(
        title="CIFAR-100",
        folder="cifar-100-binary",
        train_files={"train.bin": 50_000},
        test_files={"test.bin": 10_000},
        label_bytes=2,
        num_classes=100,
        archive=Archive(TORONTO + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        python_folder="cifar-100-python",
        python_archive=Archive(TORONTO + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        digests={
            "train.bin": "e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
            "test.bin": "8fb6623e830365ff53cf14adec797474f5478006",
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
}


def official(name: str) -> OfficialData:
    """The description of ``name``, one of ``FORMATS``."""
    layout = FORMATS[name]
    archives = f"{layout.archive.file_name}, {layout.python_archive.file_name}"
    return OfficialData(
        name,
        layout.title,
        IMAGE_SHAPE,
        train_size=sum(layout.train_files.values()),
        test_size=sum(layout.test_files.values()),
        num_classes=layout.num_classes,
        crop=True,
        flip=True,
        kind_of_files="data",
        places=f"the folder with {', '.join(layout.files)} (or {', '.join(layout.pickles)}), its parent, {archives} or "
        "the folder that holds one of them",
        archives=(layout.archive,),
        find=functools.partial(find, layout),
        read=functools.partial(read, layout),
    )


def find(layout: Format, place: Path) -> Path | None:
    """The folder of data files or the archive at or in ``place``, or ``None``."""
    if place.is_file():
        return place
    for folder in (place, place / layout.folder, place / layout.python_folder):
        binary, python = ([(folder / name).is_file() for name in names] for names in (layout.files, layout.pickles))
        # A folder may have a file called "train" for any reason.
        if any(binary) or all(python) or (any(python) and folder.name == layout.python_folder):
            return folder
    archives = (place / archive.file_name for archive in (layout.archive, layout.python_archive))
    return next((archive for archive in archives if archive.is_file()), None)


def read(layout: Format, place: Path) -> tuple[Arrays, tuple[str, ...]]:
    """Reads a folder of data files, or their archive, as found by :func:`find`; says which are not the published ones.

    Raises:
      DataError: a file is missing, cannot be read, has the wrong size, or holds a label out of range; a pickle is not a
        published one.
    """
    if place.is_file() and (place.suffix == ".bin" or place.name in layout.pickles):
        raise DataError(
            f"{place} is a single file; those of {layout.title} are {', '.join(layout.files)}. Give the folder that "
            f"holds all of them, such as {place.parent}"
        )
    contents = _read_folder(layout, place) if place.is_dir() else _read_archive(layout, place)
    decode, names = _decode, layout.files
    if contents.keys() & layout.pickles.keys() and not contents.keys() & names.keys():
        decode, names = _decode_pickle, layout.pickles
    missing = [name for name in names if name not in contents]
    if missing:
        raise DataError(
            f"{place} is not a complete copy of {layout.title}: {', '.join(missing)} missing. It must hold "
            f"{', '.join(names)}. Unpack {layout.archive.url} again, or pass that archive itself"
        )
    contents = {name: contents[name] for name in names}
    paths = {name: place / name if place.is_dir() else place for name in names}
    different = not_published(contents, layout.digests, paths)
    if decode is _decode_pickle and (different or not layout.digests.keys() >= names.keys()):
        raise DataError(
            f"{place} holds pickles of {layout.title} that are not the published ones ({', '.join(different)}), and a "
            f"pickle may run any code: they are not read. Download {layout.archive.url}, which has none, or "
            f"{layout.python_archive.url} again"
        )
    # Popped, so that the pixels are not in memory twice.
    decoded = [decode(layout, place, name, contents.pop(name)) for name in names]
    n = len(layout.train_files)
    return Arrays(*_concatenate(decoded[:n]), *_concatenate(decoded[n:])), different


def _read_folder(layout: Format, folder: Path) -> dict[str, bytes]:
    names = [name for name in (*layout.files, *layout.pickles) if (folder / name).is_file()]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        path = error.filename or folder
        raise DataError(f"{path} cannot be read: {error.strerror}. Make it readable, or use another copy") from error


class _Bounded:
    """A stream of which at most ``limit`` bytes can be read: a small archive may unpack to very many."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit, self._count = stream, limit, 0

    def read(self, size: int) -> bytes:
        """As of a file; OSError beyond the limit."""
        content = self._stream.read(size)
        self._count += len(content)
        if self._count > self._limit:
            raise OSError(f"it unpacks to more than {self._limit:,} bytes")
        return content


def _read_archive(layout: Format, path: Path) -> dict[str, bytes]:
    """The contents of the expected members, by name; all other members are skipped."""
    contents: dict[str, bytes] = {}
    sizes, folders = layout.files | layout.pickles, ([], [layout.folder], [layout.python_folder])
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
        # A stream, read once from the front: seeking back in a gzip file would unpack it again from the start.
        with gzip.open(path) if packed else path.open("rb") as stream:
            bounded: Any = _Bounded(stream, 2 * sum(layout.files.values()) + 2**20)
            with tarfile.open(fileobj=bounded, mode="r|" if packed else "r|*") as tar:
                for member in tar:
                    *parents, name = PurePosixPath(member.name).parts or ("",)
                    if name not in sizes or parents not in folders or name in contents:
                        continue
                    file = tar.extractfile(member) if member.isreg() else None
                    if file is None:
                        raise DataError(f"{path}: {member.name} is not a plain file. {layout.archive.again}")
                    contents[name] = file.read(2 * sizes[name])
            while bounded.read(2**20):  # to its end, where the checksum of all stands
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is not a readable .tar.gz archive ({error}). {layout.archive.again}") from error
    return contents


def _decode_pickle(layout: Format, place: Path, name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    counts = {**layout.train_files, **layout.test_files}
    try:
        pixels, labels = read_pickle(content, counts[f"{name}.bin"], PIXELS)
    except ValueError as error:
        raise DataError(f"{place}: {name} {error}. {layout.python_archive.again}") from error
    return _checked(layout, place, name, pixels, labels.astype(np.int32))


def _decode(layout: Format, place: Path, name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    expected, record = layout.files[name], layout.label_bytes + PIXELS
    if len(content) != expected:
        raise DataError(
            f"{place}: {name} has {len(content):,} bytes; it must have {expected:,} ({expected // record:,} records of "
            f"{record:,}). {layout.archive.again}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, layout.label_bytes - 1].astype(np.int32)
    return _checked(layout, place, name, records[:, layout.label_bytes :], labels)


def _checked(
    layout: Format, place: Path, name: str, pixels: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, 32, 32, 3)`` and labels; a DataError if one of these is out of range."""
    wrong = np.flatnonzero((labels < 0) | (labels >= layout.num_classes))
    if wrong.size:
        raise DataError(
            f"{place}: record {wrong[0]} of {name} has the label {labels[wrong[0]]}; {layout.title} has labels "
            f"0..{layout.num_classes - 1}. {layout.archive.again}"
        )
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _concatenate(files: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*files, strict=True)
    # The planes of a record are transposed: without a copy NumPy would keep that order in memory.
    return np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels)
