"""Sums over a test set, by a network whose last stage may be in another process."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax

from fr_jax import distributed
from fr_jax._arrays import is_readable, put, read
from fr_jax.types import Array, Batch, PyTree

__all__ = ["sum_over"]

BATCHES_IN_FLIGHT = 4  # the device computes the next ones while the host reads; more would hold memory


def sum_over(
    sums: Callable[[PyTree, PyTree, int], dict[str, Array]],
    predict: Callable[[Any, PyTree], PyTree],
    state: Any,
    batches: Iterable[tuple[Batch, int]],
) -> dict[str, float]:
    """Evaluates the network in inference mode and adds up what each batch gives.

    Args:
      sums: ``(outputs, targets, valid) -> {name: scalar}``, jitted: sums over the first ``valid`` examples of a batch.
      predict: ``Algorithm.predict``.
      state: a training state.
      batches: pairs of a batch of fixed size and how many of its first examples count.

    Returns:
      The totals by name, and ``"examples"``: how many counted. In a run of several processes all must call this, and
      all get them.

    Raises:
      ValueError: there is no example.
    """
    totals: dict[str, float] = {}
    examples = 0
    pending: deque[dict[str, Array]] = deque()

    def collect() -> None:
        for name, value in pending.popleft().items():
            if is_readable(value):  # where the last stage is
                totals[name] = totals.get(name, 0.0) + float(read(value))

    group = distributed.group()
    for number, (batch, valid) in enumerate(batches, start=1):
        outputs = predict(state, batch.inputs)
        where = jax.tree.leaves(outputs)[0].sharding
        targets = jax.tree.map(functools.partial(put, sharding=where), batch.targets)
        pending.append(sums(outputs, targets, valid))
        examples += valid
        if len(pending) > BATCHES_IN_FLIGHT:
            collect()
        if group.size > 1 and number % BATCHES_IN_FLIGHT == 0:
            group.exchange(None)  # processes without the last stage wait for the one that has it
    while pending:
        collect()
    if not examples:
        raise ValueError("there are no examples to evaluate; the test set needs at least one.")
    found = group.exchange(totals or None)
    return next(known for known in found if known is not None) | {"examples": examples}
