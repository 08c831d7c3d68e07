"""What the step loop of each method issues, as data: tasks in the order of ``fr_jax.algorithms``.

Modules count from 0; module k runs on device k, module K-1 computes the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fr_jax.diagnostics.simulation.timeline import Need, Task
from fr_jax.diagnostics.simulation.times import Times

__all__ = [
    "SCHEDULES",
    "back_propagation",
    "data_parallel",
    "ddg",
    "dni",
    "features_replay",
    "features_replay_lockstep",
    "gpipe",
]


class _Queue:
    """Tasks in the order of issue."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.tasks: list[Task] = []

    def issue(self, kind: str, k: int, step: int, minibatch: int, *needs: Need | None) -> int:
        """The task's position. Needs that are None there are not."""
        seconds = getattr(self.times.modules[k], kind)
        self.tasks.append(Task(kind, k, seconds, minibatch, step, tuple(need for need in needs if need is not None)))
        return len(self.tasks) - 1

    def follow(self, kind: str, k: int, step: int, minibatch: int) -> None:
        """A task that no other device waits for; left out where it takes no time."""
        if getattr(self.times.modules[k], kind) != 0:
            self.issue(kind, k, step, minibatch)

    def down(self, task: int, k: int) -> Need:
        """The output of module k, at module k+1."""
        return Need(task, self.times.features[k])

    def up(self, task: int | None, k: int) -> Need | None:
        """The gradient that module k+1 sends, at module k."""
        return None if task is None else Need(task, self.times.gradients[k])


def _opened(times: Times, steps: int) -> tuple[_Queue, int]:
    K = len(times.modules)
    if K < 1 or len(times.features) != K - 1 or len(times.gradients) != K - 1:
        raise ValueError(
            f"times of {K} modules came with {len(times.features)} features and {len(times.gradients)} gradients that "
            "cross a cut; K modules, at least 1, need K-1 of each."
        )
    if steps < 1:
        raise ValueError(f"steps = {steps} was given; a schedule has at least 1.")
    return _Queue(times), K


def back_propagation(times: Times, steps: int) -> tuple[Task, ...]:
    """Back-propagation over K devices, ``fr_jax.backprop``; with K = 1 the whole network in one function.

    Balanced, without transfers, a step takes forward and backward of the whole network, for every K.

    Raises:
      ValueError: the numbers of modules and transfers do not fit, or ``steps`` is less than 1.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> from fr_jax.diagnostics.simulation.times import times_of_costs
      >>> summarise(simulate(back_propagation(times_of_costs([1.0, 2.0]), steps=4))).step_seconds
      3.0
    """
    queue, K = _opened(times, steps)
    for t in range(steps):
        h = None
        for k in range(K - 1):
            h = queue.down(queue.issue("forward", k, t, t, h), k)
        delta = queue.issue("last", K - 1, t, t, h)
        for k in reversed(range(K - 1)):
            delta = queue.issue("backward", k, t, t, queue.up(delta, k))
            queue.follow("update", k, t, t)
    return tuple(queue.tasks)


def features_replay(times: Times, steps: int) -> tuple[Task, ...]:
    """Features replay as data flow, ``fr_jax.features_replay``.

    Without transfers, and cut so that 4 forward passes of module k < K take as long as 3 of module K, a step takes
    12/(3K+1) of the network's forward pass: a speedup of (3K+1)/4 over back-propagation. Transfers of x seconds each
    make it 2x (K-1)/K longer: the loop from module K's gradient down to module 1's update and, K steps later, back up
    as its play has no slack.

    Raises:
      ValueError: the numbers of modules and transfers do not fit, or ``steps`` is less than 1.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> from fr_jax.diagnostics.simulation.times import balanced_shares, times_of_costs
      >>> times = times_of_costs([21 * share for share in balanced_shares(2, last_stage_weight=3 / 4)])
      >>> round(summarise(simulate(features_replay(times, steps=8))).step_seconds, 6)
      12.0
    """
    queue, K = _opened(times, steps)
    sent: dict[int, int] = {}
    for t in range(steps):
        h = None
        for k in range(K - 1):
            h = queue.down(queue.issue("play", k, t, t, h), k)
        now = {K - 1: queue.issue("last", K - 1, t, t, h)}
        for k in reversed(range(max(0, K - 1 - t), K - 1)):
            now[k] = queue.issue("replay", k, t, t + k + 1 - K, queue.up(sent.get(k + 1), k))
        sent = now
    return tuple(queue.tasks)


def features_replay_lockstep(times: Times, steps: int) -> tuple[Task, ...]:
    """Features replay with a barrier before and after the forward phase, as a step loop that waits would run it.

    All K modules play, one after the other; then all replay, at once, module K with its backward pass only. Equally
    cut, without transfers, the speedup over back-propagation is 3/(1+3/K). The library has no such loop.

    Raises:
      ValueError: the numbers of modules and transfers do not fit, or ``steps`` is less than 1.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> from fr_jax.diagnostics.simulation.times import times_of_costs
      >>> summarise(simulate(features_replay_lockstep(times_of_costs([1.5, 1.5]), steps=8))).step_seconds
      2.5
    """
    queue, K = _opened(times, steps)
    sent: dict[int, int] = {}
    for t in range(steps):
        barrier = [Need(task) for task in sent.values()]
        h = None
        for k in range(K - 1):
            h = queue.down(queue.issue("play", k, t, t, h, *barrier), k)
            barrier = []
        played = Need(queue.issue("forward", K - 1, t, t, h, *barrier))
        now = {K - 1: queue.issue("backward", K - 1, t, t)}
        queue.follow("update", K - 1, t, t)
        for k in reversed(range(max(0, K - 1 - t), K - 1)):
            now[k] = queue.issue("replay", k, t, t + k + 1 - K, played, queue.up(sent.get(k + 1), k))
        sent = now
    return tuple(queue.tasks)


def ddg(times: Times, steps: int) -> tuple[Task, ...]:
    """Decoupled parallel back-propagation, ``fr_jax.ddg``: equally cut, without transfers, K times back-propagation.

    Raises:
      ValueError: the numbers of modules and transfers do not fit, or ``steps`` is less than 1.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> from fr_jax.diagnostics.simulation.times import times_of_costs
      >>> summarise(simulate(ddg(times_of_costs([1.5, 1.5]), steps=8))).step_seconds
      1.5
    """
    queue, K = _opened(times, steps)
    sent: dict[int, int] = {}
    for t in range(steps):
        h = None
        for k in range(K - 1):
            h = queue.down(queue.issue("forward", k, t, t, h), k)
        now = {K - 1: queue.issue("last", K - 1, t, t, h)}
        for k in reversed(range(max(0, K - 1 - t), K - 1)):
            now[k] = queue.issue("backward", k, t, t + k + 1 - K, queue.up(sent.get(k + 1), k))
            queue.follow("update", k, t, t + k + 1 - K)
        sent = now
    return tuple(queue.tasks)


def dni(times: Times, steps: int) -> tuple[Task, ...]:
    """Decoupled neural interfaces, ``fr_jax.dni``: synthesizers learn last, from what module k+1 sent in this step.

    Equally cut, without transfers and with synthesizers that take no time, the speedup over back-propagation is 3K/4:
    module k waits for the forward pass of module k+1 before its synthesizer learns.

    Raises:
      ValueError: the numbers of modules and transfers do not fit, or ``steps`` is less than 1.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> from fr_jax.diagnostics.simulation.times import times_of_costs
      >>> summarise(simulate(dni(times_of_costs([1.5, 1.5]), steps=8))).step_seconds
      2.0
    """
    queue, K = _opened(times, steps)
    for t in range(steps):
        h, sent = None, []
        for k in range(K - 1):
            h = queue.down(queue.issue("forward", k, t, t, h), k)
            queue.follow("synthesize", k, t, t)
            sent.append(queue.issue("backward", k, t, t))
            queue.follow("update", k, t, t)
        sent.append(queue.issue("last", K - 1, t, t, h))
        for k in range(K - 1):
            queue.issue("learn", k, t, t, queue.up(sent[k + 1], k))
    return tuple(queue.tasks)


def gpipe(times: Times, steps: int, microbatches: int) -> tuple[Task, ...]:
    """GPipe, ``fr_jax.gpipe``: equally cut, without transfers, KM/(M+K-1) times back-propagation.

    Args:
      times: for one microbatch; ``update`` for one update.
      steps: how many.
      microbatches: M.

    Raises:
      ValueError: the numbers of modules and transfers do not fit, ``steps`` or ``microbatches`` is less than 1.

    Example:
      >>> from fr_jax.diagnostics.simulation.timeline import simulate, summarise
      >>> from fr_jax.diagnostics.simulation.times import times_of_costs
      >>> times = times_of_costs([0.75, 0.75])
      >>> summarise(simulate(gpipe(times, steps=4, microbatches=2))).step_seconds
      2.25
    """
    queue, K = _opened(times, steps)
    M = microbatches
    if M < 1:
        raise ValueError(f"microbatches = {M} was given; it must be at least 1.")
    for t in range(steps):
        deltas: list[int] = []
        for m in range(t * M, (t + 1) * M):
            h = None
            for k in range(K - 1):
                h = queue.down(queue.issue("forward", k, t, m, h), k)
            deltas.append(queue.issue("gradient", K - 1, t, m, h))
            queue.follow("accumulate", K - 1, t, m)
        for m, delta in enumerate(deltas, start=t * M):
            for k in reversed(range(K - 1)):
                delta = queue.issue("backward", k, t, m, queue.up(delta, k))
                queue.follow("accumulate", k, t, m)
        for k in reversed(range(K)):
            queue.follow("update", k, t, (t + 1) * M - 1)
    return tuple(queue.tasks)


def data_parallel(seconds: float, devices: int, steps: int, all_reduce: float = 0.0) -> tuple[Task, ...]:
    """Data-parallel back-propagation, ``fr_jax.backprop`` on ``fr_jax.placement(1, data_parallel=D)``.

    All devices wait for the sum of their gradients, and nothing runs beside it.

    Args:
      seconds: of one device for its part of the mini-batch, update included.
      devices: D.
      steps: how many.
      all_reduce: seconds of the sum (:func:`fr_jax.diagnostics.simulation.times.ring_all_reduce_seconds`).

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


SCHEDULES: Mapping[str, Callable[[Times, int], tuple[Task, ...]]] = {
    "bp": back_propagation,
    "fr": features_replay,
    "fr-lockstep": features_replay_lockstep,
    "ddg": ddg,
    "dni": dni,
}
"""``(times, steps) -> schedule`` by name; :func:`gpipe` and :func:`data_parallel` need more than that."""
