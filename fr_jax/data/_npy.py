"""Images of the user's own as NumPy files, memory-mapped: sets that are larger than memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fr_jax.data._official import Arrays
from fr_jax.data.download import DataError

FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")


def read(folder: Path) -> Arrays:
    """Maps the images, reads the labels, and checks that they fit.

    Raises:
      DataError: a file is missing or not a NumPy file, or an array has another form than a data set's.
    """
    arrays = Arrays(*(_mapped(folder / name) for name in FILES))
    for what, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        if images.ndim != 4 or images.dtype != np.uint8:
            raise DataError(
                f"{what}_images.npy in {folder} is {images.dtype}{list(images.shape)}; images are uint8 (N, H, W, C)."
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise DataError(
                f"{what}_labels.npy in {folder} is {labels.dtype}{list(labels.shape)}; labels are whole numbers (N,), "
                f"one for each of the {len(images):,} images, from 0."
            )
        if labels.min() < 0:
            raise DataError(f"{what}_labels.npy in {folder} has the label {labels.min()}; labels count from 0.")
    if arrays.train_images.shape[1:] != arrays.test_images.shape[1:]:
        shapes = " and ".join(str(list(one.shape[1:])) for one in (arrays.train_images, arrays.test_images))
        raise DataError(f"training and test images in {folder} are {shapes}; they must have the same size.")
    labels = (np.asarray(one, np.int32) for one in (arrays.train_labels, arrays.test_labels))
    return Arrays(arrays.train_images, next(labels), arrays.test_images, next(labels))


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"the data folder {path.parent} has no {path.name}; --dataset npy needs {', '.join(FILES)}.")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:  # NumPy reads a damaged header as Python source
        raise DataError(f"{path} cannot be read as a NumPy file ({error}); write it with numpy.save.") from error
