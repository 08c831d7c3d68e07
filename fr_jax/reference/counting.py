"""Arithmetic that counts its multiplications."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

__all__ = ["Counter", "Multiplications"]


class Multiplications:
    """Computes products and counts the multiplications of real numbers in them.

    Every product counts, also those with the factors 0 and 1; additions and comparisons do not.

    Attributes:
      count: the number of multiplications so far.

    Example:
      >>> counter = Multiplications()
      >>> counter.matmul(np.ones((3, 2)), np.ones(2))
      array([2., 2., 2.])
      >>> counter.times(np.arange(3.0), 2.0)
      array([0., 2., 4.])
      >>> counter.count
      9
    """

    def __init__(self) -> None:
        self.count = 0

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """``a @ b`` for vectors and matrices: ``m · n · p`` multiplications for ``(m, n) @ (n, p)``."""
        if not (1 <= a.ndim <= 2 and 1 <= b.ndim <= 2 and a.shape[-1] == b.shape[0]):
            raise ValueError(
                f"shapes {a.shape} and {b.shape} cannot be multiplied: give vectors or matrices, the last axis of the "
                "first as long as the first axis of the second."
            )
        self.count += a.size * (b.size // b.shape[0])
        return a @ b

    def times(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        """``a * b``, element by element with broadcasting: one multiplication for each element of the result."""
        product = np.multiply(a, b)
        self.count += product.size
        return product


Counter: TypeAlias = Multiplications | None
"""None: nothing is counted."""
