"""Image data sets: found on this machine, downloaded or generated, each with a line that states its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fr_jax.data import _cifar, _mnist, _npy, _tfds_copies, download
from fr_jax.data._official import Arrays, OfficialData
from fr_jax.data.download import DataError, FetchError

__all__ = ["DATASETS", "DataError", "Dataset", "load"]

OFFICIAL = ("cifar10", "cifar100", "mnist")
DATASETS: tuple[str, ...] = ("auto", *OFFICIAL, "digits", "synthetic", "npy")

MOST_COUNTED = 20_000
"""Images of a mapped set from which mean and deviation are taken, or up to twice as many."""

Log = Callable[[str], Any]


class Dataset(NamedTuple):
    """A data set for image classification, in memory or (``npy``) mapped into it.

    Attributes:
      name: one of ``DATASETS``, but never ``"auto"``.
      train_images, test_images: uint8 ``(N, H, W, C)``.
      train_labels, test_labels: int32 ``(N,)``, values ``0 .. num_classes - 1``.
      mean, std: float32 ``(C,)``, per channel, of the training images scaled to [0, 1].
      flip: whether a mirrored image is a valid example of its class.
      source: one line of text: which data these are, and where they came from.
      crop: whether training uses random crops by default; False for MNIST, as in the papers.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    mean: np.ndarray
    std: np.ndarray
    flip: bool
    source: str
    crop: bool = True


def load(
    name: str = "auto", data_dir: str | Path | None = None, *, preferred: str = "cifar10", log: Log = print
) -> Dataset:
    """Loads a data set by name.

    ``cifar10``, ``cifar100`` and ``mnist`` are read from ``data_dir`` if it is given. Otherwise they are searched for
    in the folder of TFDS (``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``) and in the user's cache folder
    (``$FR_JAX_CACHE``), and downloaded if they are in neither. ``auto`` is the ``preferred`` one of them; if that is
    not found and cannot be downloaded, it falls back to ``digits`` with a prominent line. ``digits`` and ``synthetic``
    need no files. ``npy`` are images of one's own, ``train_images.npy`` (uint8 ``(N, H, W, C)``), ``train_labels.npy``
    (``(N,)``, from 0), ``test_images.npy`` and ``test_labels.npy`` in ``data_dir``; they are mapped, so that they may
    be larger than memory, and trained on without crops and flips.

    ``data_dir`` is a TFDS folder, or: for CIFAR the folder with the official ``.bin`` files or those of the Python
    version, its parent, the official ``.tar.gz`` or its folder; for MNIST the folder with the four official idx files,
    each plain or ``.gz``, or its parent, if the folder is called ``mnist``, ``MNIST`` or ``MNIST/raw``. Files of the
    right form and other contents are named and read; pickles are read only if they are the published ones. ``log``
    receives each line for the user.

    Raises:
      DataError: the name is unknown, or the data are damaged or missing (with ``data_dir``, also for ``auto``).

    Example:
      >>> from fr_jax import data
      >>> data.load("digits").train_images.shape
      (1433, 32, 32, 3)
    """
    _check_name("there is no data set", name, DATASETS)
    _check_name("auto cannot prefer", preferred, OFFICIAL)
    if name in ("digits", "synthetic"):
        if data_dir is not None:
            log(f"The data set {name!r} needs no files: the data folder {data_dir} is not used.")
        return _digits() if name == "digits" else _synthetic()
    if name == "npy":
        return _own(data_dir)
    wanted = preferred if name == "auto" else name
    official = _mnist.official() if wanted == "mnist" else _cifar.official(wanted)
    if data_dir is not None:
        return _given(official, Path(data_dir).expanduser(), log)
    try:
        return _searched(official, log)
    except FetchError as error:
        if name != "auto":  # a program that was asked for a data set must not train on another
            raise
        dataset = _digits()
        confusable = "it is not MNIST, and " if preferred == "mnist" else ""  # digits are digits
        log(
            f"!!! NO {official.title}: not on this machine, and {error.__cause__ or error}. Training on the "
            f"stand-in {dataset.source}; {confusable}its accuracies say nothing about {official.title}. To get an "
            f"error instead, ask for {official.name} by name."
        )
        return dataset


def _check_name(problem: str, name: str, valid: tuple[str, ...]) -> None:
    if name not in valid:
        close = difflib.get_close_matches(str(name).lower().replace("-", ""), valid, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{problem} {name!r}. Valid names: {', '.join(valid)}.{meant}")


def _given(official: OfficialData, data_dir: Path, log: Log) -> Dataset:
    place = official.find(data_dir)
    if place is not None:
        return _read(official, place, f"{official.kind_of_files} files in {place}", log)
    copy = _tfds_copies.find(official.name, data_dir)
    if copy is not None:
        return _labelled(official, _tfds_copies.read(copy, official), f"the TFDS copy in {copy}")
    problem = f"holds no {official.title}" if data_dir.exists() else "does not exist"
    raise DataError(
        f"the data folder {data_dir} {problem}. It must be {official.places}, or a TFDS folder with "
        f"{official.name}/<version>/dataset_info.json. Correct it, or omit it to search this machine and download"
    )


def _searched(official: OfficialData, log: Log) -> Dataset:
    if (dataset := _from_tfds(official, log)) is not None:
        return dataset
    paths = [download.cached(archive) for archive in official.archives]
    try:
        if None in paths and _tfds_copies.can_prepare() and (dataset := _through_tfds(official, log)) is not None:
            return dataset
        pairs = zip(paths, official.archives, strict=True)
        found = [path or download.fetch(archive, log=log) for path, archive in pairs]
    except FetchError as error:
        raise FetchError(f"{official.title} is not on this machine, and {error}. {_what_to_do(official)}") from error
    if len(found) == 1:
        return _read(official, found[0], f"archive {found[0]}", log)
    folder = found[0].parent
    return _read(official, folder, f"{official.kind_of_files} files in {folder}", log)


def _read(official: OfficialData, place: Path, what: str, log: Log) -> Dataset:
    """Reads data files, and calls them official if they are the published ones, bit by bit."""
    arrays, different = official.read(place)
    if not different:
        return _labelled(official, arrays, f"the official {what}")
    urls = ", ".join(archive.url for archive in official.archives)
    log(
        f"!!! NOT THE PUBLISHED {official.title}: {', '.join(different)} in {place} should have the same size and "
        f"other contents (MD5 or SHA-1). Training on what is there; the published data are at {urls}."
    )
    return _labelled(official, arrays, f"{what} that are not the official ones")


def _from_tfds(official: OfficialData, log: Log) -> Dataset | None:
    copy = _tfds_copies.find(official.name, _tfds_copies.folder())
    if copy is None:
        return None
    try:
        return _labelled(official, _tfds_copies.read(copy, official), f"the TFDS copy in {copy}")
    except DataError as error:
        log(f"Skipping a copy of {official.name} that cannot be used: {error}.")
        return None


def _through_tfds(official: OfficialData, log: Log) -> Dataset | None:
    """Prepares a copy with TFDS; ``None`` if that fails, because the plain download may still succeed."""
    name, archive = official.name, official.archives[0]
    download.check_reachable(archive)  # TFDS would wait much longer for a network that is not there
    log(f"Downloading {name} through TFDS into {_tfds_copies.folder()}")
    try:
        _tfds_copies.prepare(name)
    except Exception as error:  # whatever goes wrong inside TFDS, TensorFlow or its mirrors
        log(f"TFDS could not prepare {name} ({type(error).__name__}: {error}); trying {archive.url} directly.")
        return None
    return _from_tfds(official, log)


def _what_to_do(official: OfficialData) -> str:
    urls = ", ".join(archive.url for archive in official.archives)
    what = "the file or its folder" if len(official.archives) == 1 else "their folder"
    return (
        f"Do one of these: (1) download {urls} on a machine with a network, and pass {what} with --data-dir; "
        f"(2) set --data-dir or TFDS_DATA_DIR to a TFDS folder that holds {official.name}, prepared with "
        f"file_format='array_record'; (3) train on data that need no download: --dataset digits, or --dataset "
        f"synthetic for benchmarks"
    )


def _labelled(official: OfficialData, arrays: Arrays, place: str) -> Dataset:
    look = {"crop": official.crop, "flip": official.flip}
    return _dataset(official.name, arrays, official.num_classes, title=official.title, place=place, **look)


def _own(data_dir: str | Path | None) -> Dataset:
    if data_dir is None:
        raise DataError(f"--dataset npy needs --data-dir FOLDER with {', '.join(_npy.FILES)}")
    folder = Path(data_dir).expanduser()
    arrays = _npy.read(folder)
    classes = int(max(arrays.train_labels.max(), arrays.test_labels.max())) + 1
    return _dataset("npy", arrays, classes, crop=False, flip=False, title="images of your own", place=str(folder))


def _digits() -> Dataset:
    """scikit-learn's digits; every fifth example of a class is a test example, so the split needs no seed."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.round(np.reshape(pixels, (-1, 8, 8)) * (255 / 16)).astype(np.uint8)
    images = np.repeat(images.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=-1)
    labels = np.asarray(targets, np.int32)
    is_test = np.zeros(len(labels), bool)
    for digit in range(10):
        is_test[np.flatnonzero(labels == digit)[::5]] = True
    arrays = Arrays(images[~is_test], labels[~is_test], images[is_test], labels[is_test])
    title = "digits (scikit-learn's 1,797 real 8x8 digits shown as 32x32x3)"
    return _dataset("digits", arrays, 10, crop=True, flip=False, title=title, place="scikit-learn")


def _synthetic(train_size: int = 10_000, test_size: int = 2_000) -> Dataset:
    """A coarse random pattern per class, half covered by noise; the same bytes on every machine."""
    rng = np.random.Generator(np.random.Philox(0))
    patterns = rng.integers(0, 128, (10, 8, 8, 3), np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    labels = np.arange(train_size + test_size, dtype=np.int32) % 10
    images = rng.integers(0, 128, (len(labels), 32, 32, 3), np.uint8)
    images += patterns[labels]
    arrays = Arrays(images[:train_size], labels[:train_size], images[train_size:], labels[train_size:])
    title = "synthetic (ten noisy patterns, 32x32x3, for benchmarks only)"
    return _dataset("synthetic", arrays, 10, crop=True, flip=True, title=title, place="NumPy's Philox generator")


def _dataset(name: str, arrays: Arrays, num_classes: int, *, crop: bool, flip: bool, title: str, place: str) -> Dataset:
    mean, std = _mean_and_std(arrays.train_images)
    sizes = f"{len(arrays.train_labels):,} train and {len(arrays.test_labels):,} test images"
    return Dataset(name, *arrays, num_classes, mean, std, flip, f"{title}: {sizes} from {place}", crop)


def _mean_and_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, of images scaled to [0, 1]."""
    # From histograms: exact counts instead of sums of 150 million floats, and no float copy of the images. Of a large
    # mapped set a part, spread over it: all of it would have to be read before training begins.
    images = images[:: max(1, len(images) // MOST_COUNTED)] if isinstance(images, np.memmap) else images
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for chunk in np.array_split(images, max(1, len(images) // 1000)):
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * np.square(values[None] - mean[:, None])).sum(axis=1))
    # A constant channel gets std 1: images are divided by it.
    return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)
