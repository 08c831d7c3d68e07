"""The Python version of CIFAR, one pickled dictionary per file, of which no code is run.

A pickle is a program that may call any function by its name. Those of CIFAR call the two that make NumPy's arrays; the
reader stands in for them, and refuses every other name. :mod:`fr_jax.data._cifar` gives it published files only.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

__all__ = ["read_pickle"]

CALLED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _StandIn:
    """What a pickle asks for to make an array or a dtype; it only holds what it is given."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in CALLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _StandIn


def read_pickle(content: bytes, records: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 ``(records, pixels)``, and labels, int64 ``(records,)``; nothing that ``content`` names is called.

    Raises:
      ValueError: it is not such a pickle; the message is the end of a sentence.
    """
    try:
        found = _Reader(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # whatever its instructions do to the reader
        raise ValueError(f"is not a pickle of CIFAR ({error})") from error
    found = {name.decode() if isinstance(name, bytes) else name: value for name, value in _items(found)}
    labels = found.get("fine_labels", found.get("labels"))
    if not (isinstance(labels, list) and len(labels) == records and all(type(label) is int for label in labels)):
        raise ValueError(f"does not have a list of {records:,} labels")
    _, shape, dtype, by_columns, raw = _state(found.get("data"), 5)
    kind = dtype.arguments[0] if isinstance(dtype, _StandIn) and dtype.arguments else None
    if shape != (records, pixels) or kind not in (b"u1", "u1") or not isinstance(raw, bytes):
        raise ValueError(f"does not have {records:,} images of {pixels:,} bytes")
    if len(raw) != records * pixels:
        raise ValueError(f"has {len(raw):,} bytes of pixels; it must have {records * pixels:,}")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C"), np.array(labels)


def _items(found: Any) -> Any:
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__} and not a dictionary")
    return found.items()


def _state(array: Any, length: int) -> tuple:
    state = array.state if isinstance(array, _StandIn) else ()
    return state if isinstance(state, tuple) and len(state) == length else (None,) * length
