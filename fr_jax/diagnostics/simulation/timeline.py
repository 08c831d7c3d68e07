"""The times at which the tasks of a schedule run.

A schedule lists everything that a method's step loop issues, in order. Each device works through its own tasks in that
order; a task starts when its device is free and what it needs has arrived:

    start_i = max(end of the device's task before i,  max over needs (j, s) of end_j + s)
    end_i   = start_i + seconds_i

A link from one device to another carries one message at a time. The host is assumed to be far ahead of the devices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np


class Need(NamedTuple):
    """What a task waits for: the result of the task at that position in the schedule, and its time to arrive."""

    task: int
    seconds: float = 0.0


class Task(NamedTuple):
    """One call that a device works on; devices count from 0."""

    kind: str  # a field of StageTimes, or "transfer"
    device: int
    seconds: float
    minibatch: int  # or micro-batch, counted over all steps
    step: int  # the iteration t that issues it
    needs: tuple[Need, ...] = ()  # what must have arrived before it starts


Schedule: TypeAlias = Sequence[Task]


class Transfer(NamedTuple):
    """A message: from device ``source`` at second ``start`` to device ``target`` at second ``end``."""

    source: int
    target: int
    start: float
    end: float


class Timeline(NamedTuple):
    """A schedule of n tasks, the ``(n,)`` seconds at which they start and end, and the messages that took time."""

    schedule: tuple[Task, ...]
    start: np.ndarray
    end: np.ndarray
    transfers: tuple[Transfer, ...]


class Summary(NamedTuple):
    """A timeline in steady state: seconds from one step to the next, and the bubble of all devices and of each.

    A bubble is the share of the time, 0 to 1, in which devices do not compute. A second forward pass counts as work, a
    transfer that occupies a device does not.
    """

    step_seconds: float
    bubble: float
    bubbles: tuple[float, ...]


def simulate(schedule: Schedule) -> Timeline:
    """Computes when every task starts and ends, in time linear in the number of tasks and needs.

    Raises:
      ValueError: a task takes a time that is negative or not finite, or needs a task that is issued after it.

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
            # The messages of a link go out in the order in which their readers are issued.
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
    problem = None
    if not 0 <= task.seconds < math.inf:
        advice = "it must be a finite time, at least 0. NaN means not measured: measure this kind too."
        problem = f"takes {task.seconds} s; {advice}"
    for j, seconds in task.needs:
        if not 0 <= j < i:
            problem = f"needs task {j}; it can only need tasks that are issued before it. Issue it later."
        # A little below 0 is allowed: `occupying` lets a receiver start before its sender is done.
        elif not -schedule[j].seconds <= seconds < math.inf:
            problem = f"waits {seconds} s for the result of task {j}; a transfer takes a finite time, at least 0."
    if problem is not None:
        raise ValueError(f"task {i}, {task.kind} of mini-batch {task.minibatch} on device {task.device}, {problem}")


def occupying(schedule: Schedule, share: float) -> tuple[Task, ...]:
    """The schedule with transfers that occupy the devices, as those over sockets do: the processor copies them.

    A message of s seconds keeps its sender busy for ``share * s`` right after the task that made it, and its receiver
    for as long right before the task that needs it. From the start of the first to the end of the second it takes s,
    or more if the receiver is busy.

    ``share`` is 0 (transfers do not disturb the work) to 1 (both devices do nothing else during a transfer).

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
    place: list[int] = []  # where each task of the schedule now stands
    sends: dict[tuple[int, int], int] = {}  # (sender, reader) -> where the sending stands
    for i, task in enumerate(schedule):
        needs = []
        for j, seconds in task.needs:
            if (j, i) not in sends:
                needs.append(Need(place[j], seconds))
                continue
            # Above a share of 1/2 sending and receiving overlap: the receiver may start before the sender is done.
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
    """The tasks from iteration ``step`` on, with everything before it done and arrived.

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
    """Seconds per step, and bubbles, in steady state.

    For each device, the time from the end of its last task of step ``skip - 1`` to the end of its last task counts.
    The first ``skip`` steps, by default half of them, are left out: in them the pipeline fills.

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
        advice = "it must be at least 1 and leave at least one. Simulate more steps."
        raise ValueError(f"skip = {skip} of {steps} steps was given; {advice}")
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
