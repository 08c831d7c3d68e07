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
    """A data set as published by its authors: its contents, its addresses, and how to read its files.

    Attributes:
      name: the name in TFDS and in :func:`fr_jax.data.load`; ``title`` is that in messages.
      image_shape: ``(H, W, C)``.
      crop, flip: as in :class:`fr_jax.data.Dataset`.
      kind_of_files, places: for messages: such as "binary", and what a data folder may be.
      archives: the official downloads, all of them needed.
      find: ``place -> Path | None``: what :attr:`read` accepts, at or below a folder or file given by a user.
      read: ``Path -> Arrays``, from what :attr:`find` returned, from the downloaded archive, or from the folder of the
        downloaded archives if there are several. Raises ``DataError`` if data are missing or damaged.
    """

    name: str
    title: str
    image_shape: tuple[int, int, int]
    train_size: int
    test_size: int
    num_classes: int
    crop: bool
    flip: bool
    kind_of_files: str
    places: str
    archives: tuple[Archive, ...]
    find: Callable[[Path], Path | None]
    read: Callable[[Path], Arrays]
