"""What the readers of official data sets share: the arrays that they return and the description of a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fr_jax.data.download import Archive


class Arrays(NamedTuple):
    """Images, uint8 ``(N, H, W, C)``, and labels, int32 ``(N,)``, of both splits."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class OfficialData(NamedTuple):
    """A data set as published by its authors: its contents, its addresses, and how to read its files."""

    name: str  # in TFDS and in fr_jax.data.load
    title: str  # in messages
    image_shape: tuple[int, int, int]  # (H, W, C)
    train_size: int
    test_size: int
    num_classes: int
    crop: bool  # as in Dataset
    flip: bool
    kind_of_files: str  # for messages, such as "binary"
    places: str  # for messages: what a data folder may be
    archives: tuple[Archive, ...]  # the official downloads, all of them needed
    find: Callable[[Path], Path | None]  # what `read` accepts, at or below a folder or file given by a user
    # From what `find` returned, from the downloaded archive, or from the folder of the downloaded archives if there are
    # several; with the names of the files that are not as published. Raises DataError if data are missing or damaged.
    read: Callable[[Path], tuple[Arrays, tuple[str, ...]]]
