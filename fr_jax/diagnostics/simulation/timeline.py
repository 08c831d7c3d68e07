"""Schedules as data, and the times at which their tasks run.

A schedule is everything that a method's step loop issues, in the order in which it issues it. Every device works
through its own tasks in that order; a task starts when its device is free and what it needs has arrived:

    start_i = max(end of the device's task before i,  max over needs (j, s) of end_j + s)
    end_i   = start_i + seconds_i

A link from one device to another carries one message at a time. The host is taken to be far ahead of the devices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

__all__ = [
    "Need",
    "Schedule",
    "Summary",
    "Task",
    "Timeline",
    "Transfer",
    "occupying",
    "resumed",
    "simulate",
    "summarise",
]


class Need(NamedTuple):
    """What a task waits for.

    Attributes:
      task: the position in the schedule of the task that makes it.
      seconds: how long it is on its way after that.
    """

    task: int
    seconds: float = 0.0


class Task(NamedTuple):
    """One call that a device works on.

    Attributes:
      kind: what is done, a name from ``fr_jax.diagnostics.simulation.schedules.ModuleTimes``, or ``"transfer"``.
      device: counted from 0.
      seconds: of the device.
      minibatch: which one is worked on; for GPipe the microbatch, counted through.
      step: the iteration t that issues it.
      needs: what must have arrived, beside everything that the same device did before.
    """

    kind: str
    device: int
    seconds: float
    minibatch: int
    step: int
    needs: tuple[Need, ...] = ()


Schedule: TypeAlias = Sequence[Task]


class Transfer(NamedTuple):
    """A message on a link: from device ``source`` at second ``start`` to device ``target`` at second ``end``."""

    source: int
    target: int
    start: float
    end: float


class Timeline(NamedTuple):
    """A schedule with its times.

    Attributes:
      schedule: n tasks.
      start, end: ``(n,)`` seconds since the first task may start.
      transfers: what was on a link for longer than nothing.
    """

    schedule: tuple[Task, ...]
    start: np.ndarray
    end: np.ndarray
    transfers: tuple[Transfer, ...]


class Summary(NamedTuple):
    """A timeline in steady state.

    Attributes:
      step_seconds: from one step to the next.
      bubble: the share of all devices' time, 0 to 1, in which they do not compute. A second forward pass is work, a
        transfer that occupies a device is not.
      bubbles: the same, one a device.
    """

    step_seconds: float
    bubble: float
    bubbles: tuple[float, ...]


def simulate(schedule: Schedule) -> Timeline:
    """When every task starts and ends.

    Args:
      schedule: tasks in the order of issue.

    Returns:
      The timeline, in time linear in the number of tasks and needs.

    Raises:
      ValueError: a task takes a time that is negative or not finite, or needs one that is issued after it.

    Example:
      >>> first = Task("forward", device=0, seconds=1.0, minibatch=0, step=0)
      >>> second = Task("last", device=1, seconds=3.0, minibatch=0, step=0, needs=(Need(0, seconds=0.5),))
      >>> simulate([first, second]).end.tolist()
      [1.0, 4.5]
    """
    start, end = np.zeros(len(schedule)), np.zeros(len(schedule))
    device_free: dict[int, float] = defaultdict(float)
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    transfers = []
    for i, task in enumerate(schedule):
        _check(i, task, schedule)
        begin = device_free[task.device]
        for j, seconds in task.needs:
            arrival, link = float(end[j]) + seconds, (schedule[j].device, task.device)
            if seconds > 0 and link[0] != link[1]:
                sent = max(float(end[j]), link_free[link])
                arrival = link_free[link] = sent + seconds
                transfers.append(Transfer(*link, sent, arrival))
            begin = max(begin, arrival)
        start[i], end[i] = begin, begin + task.seconds
        device_free[task.device] = begin + task.seconds
    return Timeline(tuple(schedule), start, end, tuple(transfers))


def _check(i: int, task: Task, schedule: Schedule) -> None:
    if not 0 <= task.seconds < math.inf:
        raise ValueError(
            f"task {i}, {task.kind} of mini-batch {task.minibatch} on device {task.device}, takes {task.seconds} s; it "
            "must be a finite time, at least 0. NaN stands for what was not measured: measure this kind too."
        )
    for j, seconds in task.needs:
        if not 0 <= j < i:
            raise ValueError(
                f"task {i}, {task.kind} on device {task.device}, needs task {j}; it can need one of the tasks before "
                "it. Issue it later."
            )
        if not -schedule[j].seconds <= seconds < math.inf:
            raise ValueError(
                f"task {i}, {task.kind} on device {task.device}, waits {seconds} s for what task {j} makes; a transfer "
                "takes a finite time, at least 0."
            )


def occupying(schedule: Schedule, share: float) -> tuple[Task, ...]:
    """The same schedule where transfers occupy the devices, as those over sockets do, which the processor copies.

    A message of s seconds then keeps its sender busy for ``share * s`` right after the task that made it, and its
    receiver for as long right before the task that needs it. It takes s from the start of the one to the end of the
    other, and longer where the receiver is busy.

    Args:
      schedule: tasks whose needs take time.
      share: 0 (transfers run beside the work) to 1 (both devices do nothing else meanwhile).

    Raises:
      ValueError: the share is not between 0 and 1.

    Example:
      >>> first = Task("forward", device=0, seconds=1.0, minibatch=0, step=0)
      >>> second = Task("last", device=1, seconds=3.0, minibatch=0, step=0, needs=(Need(0, seconds=0.5),))
      >>> [(task.kind, task.device) for task in occupying([first, second], 0.4)]
      [('forward', 0), ('transfer', 0), ('transfer', 1), ('last', 1)]
      >>> simulate(occupying([first, second], 0.4)).end.round(3).tolist()
      [1.0, 1.2, 1.5, 4.5]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share} was given; it must be between 0 and 1.")
    if share == 0:
        return tuple(schedule)
    readers: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for i, task in enumerate(schedule):
        for j, seconds in task.needs:
            if seconds > 0 and schedule[j].device != task.device:
                readers[j].append((i, seconds))
    made: list[Task] = []
    place: list[int] = []
    sends: dict[tuple[int, int], int] = {}
    for i, task in enumerate(schedule):
        needs = []
        for j, seconds in task.needs:
            if (j, i) not in sends:
                needs.append(Need(place[j], seconds))
                continue
            on_the_way = Need(sends[j, i], (1 - 2 * share) * seconds)
            made.append(Task("transfer", task.device, share * seconds, schedule[j].minibatch, task.step, (on_the_way,)))
            needs.append(Need(len(made) - 1))
        made.append(task._replace(needs=tuple(needs)))
        place.append(len(made) - 1)
        for reader, seconds in readers[i]:
            made.append(Task("transfer", task.device, share * seconds, task.minibatch, task.step))
            sends[i, reader] = len(made) - 1
    return tuple(made)


def resumed(schedule: Schedule, step: int) -> tuple[Task, ...]:
    """The schedule from a step on, where all that was issued before has been done and has arrived.

    Args:
      schedule: from step 0 on.
      step: the first that is left.

    Example:
      >>> steps = [Task("last", device=0, seconds=2.0, minibatch=t, step=t) for t in range(4)]
      >>> simulate(resumed(steps, 1)).end.tolist()
      [2.0, 4.0, 6.0]
    """
    left = [i for i, task in enumerate(schedule) if task.step >= step]
    place = {i: new for new, i in enumerate(left)}
    return tuple(
        schedule[i]._replace(needs=tuple(Need(place[j], seconds) for j, seconds in schedule[i].needs if j in place))
        for i in left
    )


def summarise(timeline: Timeline, skip: int | None = None) -> Summary:
    """Seconds a step, and bubbles, in steady state.

    Of every device the time from the end of its last task of step ``skip - 1`` to that of the last step counts.

    Args:
      timeline: of at least two steps.
      skip: steps in which the devices fill; by default the first half.

    Raises:
      ValueError: ``skip`` leaves no step, or is less than 1.

    Example:
      >>> steps = [Task("last", device=0, seconds=2.0, minibatch=t, step=t) for t in range(4)]
      >>> summarise(simulate(steps))
      Summary(step_seconds=2.0, bubble=0.0, bubbles=(0.0,))
    """
    steps = 1 + max((task.step for task in timeline.schedule), default=-1)
    skip = steps // 2 if skip is None else skip
    if not 1 <= skip < steps:
        raise ValueError(
            f"skip = {skip} of {steps} steps was given; it must be at least 1 and leave at least one. "
            "Simulate more steps."
        )
    devices = sorted({task.device for task in timeline.schedule})
    first, last, busy = (dict.fromkeys(devices, 0.0) for _ in range(3))
    for task, end in zip(timeline.schedule, timeline.end.tolist(), strict=True):
        last[task.device] = end
        if task.step < skip:
            first[task.device] = end
        elif task.kind != "transfer":
            busy[task.device] += task.seconds
    spans = {device: last[device] - first[device] for device in devices}
    bubbles = tuple(max(0.0, 1 - busy[device] / spans[device]) if spans[device] else 0.0 for device in devices)
    total = sum(spans.values())
    bubble = max(0.0, 1 - sum(busy.values()) / total) if total else 0.0
    return Summary(max(spans.values()) / (steps - skip), bubble, bubbles)
