"""What the readers of the official data sets have in common: the arrays they give, and how a data set is described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fr_jax.data.download import Archive

__all__ = ["Arrays", "OfficialData"]


class Arrays(NamedTuple):
    """Images, uint8 ``(N, H, W, C)``, and labels, int32 ``(N,)``, of both splits."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class OfficialData(NamedTuple):
    """A data set as its authors publish it: what it holds, where it is on the web, how its files are read.

    Attributes:
      name: as TFDS and :func:`fr_jax.data.image_sets.load` call it.
      title: its name for people.
      image_shape: ``(H, W, C)``.
      train_size, test_size: number of examples.
      num_classes: labels are 0 .. num_classes - 1.
      crop, flip: as in :class:`fr_jax.data.image_sets.Dataset`.
      kind_of_files: for people, such as "binary".
      places: for people, what a data folder may be.
      archives: the official downloads; all of them are needed.
      find: ``place -> Path | None``, what :attr:`read` can read at, or below, a folder or file that a user names.
      read: ``Path -> Arrays``; raises ``DataError`` for what is missing or damaged. It takes what :attr:`find` gave,
        the downloaded archive, or, if there are several archives, the folder that holds them.
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
