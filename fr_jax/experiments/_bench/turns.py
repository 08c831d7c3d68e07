"""Timing things side by side: contestants take turns, on one process or a group, each turn from rest to rest."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax

from fr_jax.distributed import group
from fr_jax.types import Array

__all__ = ["Contestant", "TakesTurns", "Turn", "as_rows", "in_turns", "quietly", "spread"]

ISSUED_FROM_REST = 2
"""Steps at the start of a turn whose issue is timed: nothing is in flight yet that could hold the host up."""


class Turn(NamedTuple):
    """What one turn took, in seconds a step.

    Attributes:
      seconds: from all processes at rest to all processes at rest.
      host: of the first steps, from the call to its return: what a loop must spend before it can go on. Where devices
        share the host's cores it may include waiting for a core.
      host_cpu: processor time of the calling thread in them.
      busy: processor time of this process, all its threads: host, devices and transfers.
    """

    seconds: float
    host: float
    host_cpu: float
    busy: float


class Contestant(NamedTuple):
    """Something to time: ``run(carry) -> (carry, loss)`` is one training step."""

    name: str
    run: Callable[[Any], tuple[Any, Array]]
    carry: Any

    def take_turn(self, steps: int) -> tuple[Contestant, Turn]:
        """``steps`` steps, from all processes at rest to all processes at rest."""
        group().exchange(None)
        start, busy, thread = time.perf_counter(), time.process_time(), time.thread_time()
        carry, loss, issued = self.carry, None, (0.0, 0.0)
        for i in range(steps):
            carry, loss = self.run(carry)
            if i < ISSUED_FROM_REST:
                issued = ((time.perf_counter() - start) / (i + 1), (time.thread_time() - thread) / (i + 1))
        arrays = [x for x in jax.tree.leaves((carry, loss)) if isinstance(x, jax.Array)]
        jax.block_until_ready([shard.data for x in arrays for shard in x.addressable_shards])
        busy = time.process_time() - busy
        group().exchange(None)
        seconds = time.perf_counter() - start
        return self._replace(carry=carry), Turn(seconds / steps, *issued, busy / steps)


class TakesTurns(Protocol):
    """What can be timed beside others: a :class:`Contestant`, or a program of somebody else's."""

    @property
    def name(self) -> str: ...

    def take_turn(self, steps: int) -> tuple[Self, Turn]: ...


def in_turns(
    contestants: Sequence[TakesTurns], *, rounds: int, steps: int, warm_up: int, log: Callable[[str], None] = print
) -> dict[str, list[Turn]]:
    """Warm-up, then rounds in which each contestant has its turn, so that a slow minute hits all of them.

    Args:
      contestants: with names of their own.
      rounds: how many turns each has.
      steps: of a turn.
      warm_up: steps of each before the first round; what they take is not reported.
      log: told what goes on.

    Returns:
      By name, one :class:`Turn` a round, as this process saw it.
    """
    field = list(contestants)
    turns: dict[str, list[Turn]] = {one.name: [] for one in field}
    for i, one in enumerate(field):
        field[i], _ = one.take_turn(warm_up)
        log(f"ready: {one.name}")
    for number in range(rounds):
        for i, one in enumerate(field):
            field[i], turn = one.take_turn(steps)
            turns[one.name].append(turn)
        log(f"round {number + 1} of {rounds}")
    return turns


def spread(values: Sequence[float], name: str = "seconds") -> dict[str, float]:
    """``NAME_median``, ``NAME_min`` and ``NAME_max``.

    Example:
      >>> from fr_jax.experiments._bench.turns import spread
      >>> spread([3.0, 1.0, 2.0])
      {'seconds_median': 2.0, 'seconds_min': 1.0, 'seconds_max': 3.0}
    """
    return {f"{name}_{of.__name__}": of(values) for of in (statistics.median, min, max)}


def quietly(text: str) -> None:
    """Says it on stderr, from the first process only: stdout is for the result."""
    if group().index == 0:
        print(text, file=sys.stderr, flush=True)


def as_row(turns: Sequence[Turn], everywhere: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """A contestant's numbers for JSON; ``everywhere`` is each process's ``busy``, round by round."""
    row: dict[str, Any] = spread([turn.seconds for turn in turns])
    row |= spread([turn.host for turn in turns], "host_seconds")
    row["host_cpu_seconds_median"] = statistics.median(turn.host_cpu for turn in turns)
    row["busy_seconds_median_by_process"] = [statistics.median(busy) for _, busy in sorted(everywhere.items())]
    row["rounds"] = [turn.seconds for turn in turns]
    return row


def as_rows(turns: Mapping[str, Sequence[Turn]]) -> dict[str, dict[str, Any]]:
    """The rows of all contestants; in a group all processes must call it."""
    busy = group().exchange([[turn.busy for turn in own] for own in turns.values()])
    return {
        name: as_row(own, {process: rows[i] for process, rows in enumerate(busy)})
        for i, (name, own) in enumerate(turns.items())
    }
