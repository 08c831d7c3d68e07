"""An immutable first-in, first-out buffer: the features a stage has been sent and not yet replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fr_jax.types import PyTree

__all__ = ["History", "empty", "pop", "push"]


class History(NamedTuple):
    """Features, oldest first. A pytree; nothing is ever changed in place.

    Attributes:
      entries: tuple of pytrees of the same shapes.
    """

    entries: tuple[PyTree, ...]


def empty(length: int, zeros: Callable[[], PyTree]) -> History:
    """A history of ``length`` entries of zeros.

    The features replay paper sets h^{s} = 0 for s < 0. Filling it at once also keeps the structure of a
    training state the same from the first step to the last.

    Args:
      length: entries to hold between steps, 0 or more.
      zeros: makes one entry; called once an entry, because entries may be donated.

    Example:
      >>> import jax.numpy as jnp
      >>> from fr_jax.algorithms import _history as history
      >>> buffer = history.push(history.empty(1, lambda: jnp.zeros(2)), jnp.ones(2))
      >>> oldest, buffer = history.pop(buffer)
      >>> float(oldest.sum()), len(buffer.entries)
      (0.0, 1)
    """
    return History(tuple(zeros() for _ in range(length)))


def push(history: History, entry: PyTree) -> History:
    """``history`` with ``entry`` as its newest."""
    return History((*history.entries, entry))


def pop(history: History) -> tuple[PyTree, History]:
    """The oldest entry, and ``history`` without it."""
    oldest, *rest = history.entries
    return oldest, History(tuple(rest))
