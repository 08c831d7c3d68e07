"""Mini-batches from an iterator of the user's own: a Grain loader, a torch ``DataLoader``, a generator."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from fr_jax._arrays import place
from fr_jax.data.download import DataError
from fr_jax.data.pipelines import InputPipeline
from fr_jax.types import Batch

__all__ = ["iterator_pipeline"]

POSITIONS = (("get_state", "set_state"), ("state", "set_state"), ("state_dict", "load_state_dict"))
"""Methods by which iterators say and take their position: Grain's, plain ones, torchdata's."""


def iterator_pipeline(
    batches: Iterable[Any],
    *,
    steps_per_epoch: int,
    sharding: Sharding | None = None,
    test_batches: Callable[[], Iterable[tuple[Batch, int]]] = tuple,
) -> InputPipeline:
    """Feeds the training loop from an iterator, or from an iterable that begins anew when it ends.

    Its position is saved with every checkpoint if it can say it: by ``get_state()`` and ``set_state(state)`` (Grain),
    ``state()`` and ``set_state(state)``, or ``state_dict()`` and ``load_state_dict(state)`` (torchdata, whose states
    may hold tensors, which are refused), of the iterator or of the iterable; a state is bytes, or what JSON holds. A
    run that is fed by any other iterator cannot be resumed: the loop then refuses its first mini-batch.

    Args:
      batches: of mini-batches: an ``fr_jax.Batch``, or a pair of inputs and targets, of NumPy arrays ``(B, ...)`` (for
        a torch ``DataLoader``: a ``collate_fn`` that makes them). In a run of several processes each must give the
        same ones.
      steps_per_epoch: mini-batches that count as an epoch in reports.
      sharding: the first stage's.
      test_batches: as of :class:`InputPipeline`.

    Returns:
      The pipeline. Its ``train_batch`` must be asked for mini-batches in order; the newest may be asked for again.

    Raises:
      DataError: (by ``train_batch``) the iterator ended, gave something other than a mini-batch, or is elsewhere.

    Example:
      >>> import numpy as np
      >>> pipeline = iterator_pipeline([(np.ones((4, 3)), np.zeros(4))], steps_per_epoch=1)
      >>> pipeline.train_batch(0).inputs.shape, pipeline.train_batch(1).targets.shape
      ((4, 3), (4,))
    """
    feed = _Feed(batches, sharding)
    has = feed.names is not None
    position, seek = (feed.position, feed.seek) if has else (None, None)
    return InputPipeline(steps_per_epoch, feed.train_batch, lambda: iter(test_batches()), position, seek)


class _Feed:
    """An iterator, and at which mini-batch it is."""

    def __init__(self, batches: Iterable[Any], sharding: Sharding | None) -> None:
        self.batches, self.sharding = batches, sharding
        self.iterator = iter(batches)
        self.step = -1  # of the mini-batch that was given last
        self.newest: Batch | None = None
        has = lambda of, names: all(callable(getattr(of, name, None)) for name in names)
        found = [(of, names) for of in (self.iterator, batches) for names in POSITIONS if has(of, names)]
        self.of_iterable, self.names = (found[0][0] is batches, found[0][1]) if found else (False, None)

    def train_batch(self, step: int) -> Batch:
        if step == self.step and self.newest is not None:
            return self.newest
        if step != self.step + 1:
            names = " or ".join(f"{get}() and {put}()" for get, put in POSITIONS)
            raise DataError(
                f"mini-batch {step} was asked of an iterator that gives mini-batch {self.step + 1} next. A run is "
                f"resumed only with an iterator that can say its position, by {names}; start this one again."
            )
        self.newest, self.step = self._placed(self._next(step)), step
        return self.newest

    def _next(self, step: int) -> Any:
        for _ in range(2):
            found = next(self.iterator, None)
            if found is not None:
                return found
            self.iterator = iter(self.batches)  # an iterator gives itself, and has nothing more
        raise DataError(
            f"the iterator of mini-batches ended before mini-batch {step}. Give one that has as many as the run has "
            "steps, or an iterable that can be begun anew."
        )

    def _placed(self, found: Any) -> Batch:
        if not isinstance(found, tuple | list) or len(found) not in (2, 3):
            raise DataError(
                f"the iterator gave {type(found).__name__}; a mini-batch is an fr_jax.Batch, or a pair of inputs and "
                "targets. Convert what it gives, such as ((b['image'], b['label']) for b in loader)."
            )
        as_array = lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        return place(Batch(*jax.tree.map(as_array, tuple(found))), self.sharding)

    @property
    def _holder(self) -> Any:
        return self.batches if self.of_iterable else self.iterator

    def position(self) -> Any:
        """Behind the newest mini-batch, as JSON holds it."""
        assert self.names is not None
        state = getattr(self._holder, self.names[0])()
        if isinstance(state, bytes):
            return {"base64": base64.b64encode(state).decode()}
        try:
            return {"json": json.loads(json.dumps(state))}
        except TypeError as error:
            raise DataError(
                f"{self.names[0]}() of the iterator gave {type(state).__name__}, which is neither bytes nor what JSON "
                f"holds ({error}), so its position cannot be saved."
            ) from error

    def seek(self, position: Any, step: int) -> None:
        """Goes to where ``position`` was saved: the next mini-batch is that of ``step``."""
        assert self.names is not None
        state = base64.b64decode(position["base64"]) if "base64" in position else position["json"]
        getattr(self._holder, self.names[1])(state)
        if self.of_iterable:
            self.iterator = iter(self.batches)
        self.step, self.newest = step - 1, None
