"""What the step of each method issues, as a table, and the schedule that follows from it.

Stages count from 0: stage k runs on device k, and stage K-1 computes the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from fr_jax.diagnostics.simulation.timeline import Need, Task
from fr_jax.diagnostics.simulation.times import Times


class Row(NamedTuple):
    """Functions that some stages call, stage after stage.

    Attributes:
      kinds: what each of these stages calls, in this order: fields of
        :class:`fr_jax.diagnostics.simulation.times.StageTimes`.
      stages: ``"up"`` (0, ..., K-2), ``"last"`` (K-1), ``"down"`` (K-2, ..., 0) or ``"all"`` (K-1, ..., 0).
      needs: what the first of the kinds waits for: the ``"feature"`` of stage k-1, the ``"delta"`` of stage k+1, or
        nothing.
      stale: stage k works on mini-batch t+k-(K-1), not on mini-batch t; with M micro-batches, of these.
      once: for the last micro-batch of a mini-batch only.
    """

    kinds: tuple[str, ...]
    stages: Literal["up", "last", "down", "all"]
    needs: Literal["feature", "delta"] | None = None
    stale: bool = False
    once: bool = False


class MethodSchedule(NamedTuple):
    """One step of a method. Called with times, it gives the tasks of several steps, in the order of issue.

    Attributes:
      phases: the rows of each phase; all micro-batches go through a phase before the next phase starts.
      barriers: whether all devices wait for each other before each phase, as a step loop that waits for results does.
      split: the phases for more than one micro-batch, if others.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> from fr_jax.diagnostics.simulation.times import balanced_shares, times_of_costs
      >>> times = times_of_costs([21 * share for share in balanced_shares(2, last_stage_weight=3 / 4)])
      >>> round(summarise(simulate(features_replay(times, steps=8))).step_seconds, 6)
      12.0
    """

    phases: tuple[tuple[Row, ...], ...]
    barriers: bool = False
    split: tuple[tuple[Row, ...], ...] = ()

    def kinds(self, microbatches: int = 1) -> tuple[str, ...]:
        """The fields of ``StageTimes`` that are read."""
        return tuple(dict.fromkeys(kind for phase in self._of(microbatches) for row in phase for kind in row.kinds))

    def _of(self, microbatches: int) -> tuple[tuple[Row, ...], ...]:
        return self.split if microbatches > 1 and self.split else self.phases

    def __call__(self, times: Times, steps: int, microbatches: int = 1) -> tuple[Task, ...]:
        """The tasks; ``times`` are those of one of M micro-batches, ``update`` of one update.

        Raises:
          ValueError: the numbers of stages and transfers do not fit, or ``steps`` or ``microbatches`` is less than 1.
        """
        K = len(times.stages)
        if K < 1 or len(times.features) != K - 1 or len(times.gradients) != K - 1:
            raise ValueError(
                f"times of {K} stages came with {len(times.features)} features and {len(times.gradients)} gradients "
                "that cross a cut; K stages, at least 1, need K-1 of each."
            )
        if steps < 1 or microbatches < 1:
            raise ValueError(f"steps = {steps} and microbatches = {microbatches} were given; each must be at least 1.")
        tasks: list[Task] = []
        results: dict[tuple[str, int, int], int] = {}  # (feature or delta, stage, mini-batch) -> the task that makes it
        newest: dict[int, int] = {}  # stage -> its last task that sends something
        held: dict[int, list[Need]] = {}  # stage -> what a barrier makes its next task wait for
        for call in self._calls(K, steps, microbatches):
            if call is None:  # every device waits for all that was sent before the barrier
                held = {k: [Need(task) for task in newest.values()] for k in range(K)}
                continue
            t, row, k, minibatch = call
            needs = held.pop(k, [])
            if row.needs == "feature" and k > 0:
                needs.append(Need(results["feature", k - 1, minibatch], times.features[k - 1]))
            elif row.needs == "delta":
                needs.append(Need(results["delta", k + 1, minibatch], times.gradients[k]))
            for kind in row.kinds:
                seconds = getattr(times.stages[k], kind)
                if kind in _RESULTS:
                    results[_RESULTS[kind], k, minibatch] = newest[k] = len(tasks)
                if kind not in _LOCAL or seconds != 0:
                    tasks.append(Task(kind, k, seconds, minibatch, t, tuple(needs)))
                    needs = []
        return tuple(tasks)

    def _calls(self, K: int, steps: int, M: int) -> Iterator[tuple[int, Row, int, int] | None]:
        """``(t, row, stage, mini-batch)`` in the order of issue; None for a barrier."""
        for t in range(steps):
            for phase in self._of(M):
                if self.barriers:
                    yield None
                for m in range(t * M, (t + 1) * M):
                    for row in phase:
                        for k in _ORDERS[row.stages](K):
                            minibatch = m + k - (K - 1) if row.stale else m
                            whole = (minibatch + 1) % M == 0
                            # Before mini-batch 0, the stage has nothing to replay.
                            if minibatch >= 0 and (whole or not row.once):
                                yield t, row, k, minibatch


_ORDERS = {
    "up": lambda K: range(K - 1),
    "last": lambda K: range(K - 1, K),
    "down": lambda K: reversed(range(K - 1)),
    "all": lambda K: reversed(range(K)),
}
_RESULTS = dict.fromkeys(("play", "forward"), "feature")
_RESULTS |= dict.fromkeys(("last", "gradient", "replay", "backward"), "delta")
"""What a kind sends to another stage."""
_LOCAL = ("synthesize", "update")
"""Kinds that wait for no other device, and that no other device waits for: left out if they take no time."""

_PLAY = Row(("play",), "up", "feature")
_REPLAY = Row(("replay",), "down", "delta", stale=True)
_FORWARD = Row(("forward",), "up", "feature")
_LAST = Row(("last",), "last", "feature")
_BACKWARD = Row(("backward",), "down", "delta")
# Of more than one micro-batch.
_GRADIENT = _LAST._replace(kinds=("gradient",))
_UPDATE = Row(("update",), "all", once=True)

# The speedups below are over back-propagation on one device, for equal stages and transfers that take no time.
back_propagation = MethodSchedule(
    ((_FORWARD, _LAST, Row(("backward", "update"), "down", "delta")),),
    split=((_FORWARD, _GRADIENT, _BACKWARD, _UPDATE),),
)
"""``fr_jax.backprop`` over K devices; with K = 1 the whole network in one function. Speedup 1, for every K."""

features_replay = MethodSchedule(
    ((_PLAY, _LAST, _REPLAY),), split=((_PLAY, _GRADIENT, _REPLAY, _UPDATE._replace(stale=True)),)
)
"""``fr_jax.features_replay``. Speedup (3K+1)/4, if 4 forward passes of a stage k < K take as long as 3 of stage K.

Transfers of x seconds each make a step longer by 2x (K-1)/K: there is no slack in the loop from stage K's gradient
down to stage 1's update and, K steps later, back up as its play. With M > 1 micro-batches, whose ``replay`` makes no
update, that is so for the time of each."""

features_replay_lockstep = MethodSchedule(
    ((_PLAY, _LAST._replace(kinds=("forward",))), (Row(("backward", "update"), "last"), _REPLAY)), barriers=True
)
"""Features replay with a barrier before and after its forward phase. Speedup 3/(1+3/K): all stages play one after the
other, then all go backward at once. The library has no such loop but in ``diagnostics.profiling.lockstep``."""

ddg = MethodSchedule(
    ((_FORWARD, _LAST, Row(("backward", "update"), "down", "delta", stale=True)),),
    split=((_FORWARD, _GRADIENT, _BACKWARD._replace(stale=True), _UPDATE._replace(stale=True)),),
)
"""``fr_jax.ddg``, and ``fr_jax.pipedream_2bw`` with its micro-batches. Speedup K; transfers as for
:data:`features_replay`."""

dni = MethodSchedule(
    ((Row(("forward", "synthesize", "backward", "update"), "up", "feature"), _LAST, Row(("learn",), "up", "delta")),)
)
"""``fr_jax.dni``; synthesizers learn last, from what stage k+1 sent in this step. Speedup 3K/4, with synthesizers that
take no time: stage k waits for the forward pass of stage k+1 before its synthesizer learns."""

gpipe = MethodSchedule(((_FORWARD, _GRADIENT), (_BACKWARD, _UPDATE)))
"""``fr_jax.gpipe`` with M micro-batches. Speedup KM/(M+K-1). 1F1B takes the same time."""

SCHEDULES: Mapping[str, MethodSchedule] = {
    "bp": back_propagation,
    "fr": features_replay,
    "fr-lockstep": features_replay_lockstep,
    "ddg": ddg,
    "dni": dni,
    "gpipe": gpipe,
    "2bw": ddg,
}


def data_parallel(seconds: float, devices: int, steps: int, all_reduce: float = 0.0) -> tuple[Task, ...]:
    """Data-parallel back-propagation, ``fr_jax.backprop`` on ``fr_jax.placement(1, data_parallel=D)``.

    All devices wait for the sum of their gradients, and nothing runs at the same time.

    ``seconds`` are those of one device for its part of the mini-batch, update included; ``all_reduce`` those of the sum
    (:func:`fr_jax.diagnostics.simulation.times.ring_all_reduce_seconds`).

    Raises:
      ValueError: ``devices`` or ``steps`` is less than 1.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> summarise(simulate(data_parallel(1.5, devices=2, steps=4, all_reduce=0.25))).step_seconds
      1.75
    """
    if devices < 1 or steps < 1:
        raise ValueError(f"devices = {devices} and steps = {steps} were given; each must be at least 1.")
    tasks: list[Task] = []
    for t in range(steps):
        needs = tuple(Need(len(tasks) + d) for d in range(devices))
        tasks += [Task("last", d, seconds, t, t) for d in range(devices)]
        if all_reduce:
            tasks += [Task("transfer", d, all_reduce, t, t, needs) for d in range(devices)]
    return tuple(tasks)
