"""Schedules and their simulation: by hand, by the closed forms of the papers, and by what must hold in every case."""

import math
import time

import numpy as np
import pytest

from fr_jax.diagnostics.simulation import schedules
from fr_jax.diagnostics.simulation.schedules import SCHEDULES, data_parallel, gpipe
from fr_jax.diagnostics.simulation.timeline import (
    Need,
    Task,
    Timeline,
    Transfer,
    occupying,
    resumed,
    simulate,
    summarise,
)
from fr_jax.diagnostics.simulation.times import (
    StageTimes,
    Times,
    balanced_shares,
    ring_all_reduce_seconds,
    times_of_costs,
)

NETWORK = 3.0  # forward 1, backward 2


def ideal(K, *, last_stage_weight=1.0, transfers=0.0, parts=1):
    shares = balanced_shares(K, last_stage_weight=last_stage_weight)
    return times_of_costs([NETWORK / parts * share for share in shares], transfers)


def step_of(schedule):
    return summarise(simulate(schedule)).step_seconds


def uneven(K, seed):
    rng = np.random.default_rng(seed)
    stages = tuple(StageTimes(*rng.uniform(0.1, 2.0, len(StageTimes._fields)).tolist()) for _ in range(K))
    return Times(stages, tuple(rng.uniform(0, 1, K - 1).tolist()), tuple(rng.uniform(0, 1, K - 1).tolist()))


def all_schedules(times, steps):
    return (make(times, steps, 3 if make is gpipe else 1) for make in SCHEDULES.values())


def test_features_replay_by_hand():
    """Stage 1 plays 1 and replays 3, stage 2 takes 4, a transfer 1/2. Stage 1 replays what is one step old."""
    times = Times((StageTimes(play=1.0, replay=3.0), StageTimes(last=4.0)), (0.5,), (0.5,))
    timeline = simulate(schedules.features_replay(times, steps=3))
    found = [
        (task.kind, task.device, task.minibatch, start, end)
        for task, start, end in zip(timeline.schedule, timeline.start, timeline.end, strict=True)
    ]
    assert found == [
        ("play", 0, 0, 0.0, 1.0),
        ("last", 1, 0, 1.5, 5.5),
        ("play", 0, 1, 1.0, 2.0),
        ("last", 1, 1, 5.5, 9.5),
        ("replay", 0, 0, 6.0, 9.0),
        ("play", 0, 2, 9.0, 10.0),
        ("last", 1, 2, 10.5, 14.5),
        ("replay", 0, 1, 10.0, 13.0),
    ]
    assert timeline.transfers[:3] == (Transfer(0, 1, 1.0, 1.5), Transfer(0, 1, 2.0, 2.5), Transfer(1, 0, 5.5, 6.0))


@pytest.mark.parametrize("K", range(1, 9))
def test_closed_forms(K):
    steps = 6 * K + 4
    step = {name: step_of(make(ideal(K), steps)) for name, make in SCHEDULES.items()}
    assert step["bp"] == pytest.approx(NETWORK)
    assert step["ddg"] == pytest.approx(NETWORK / K)
    assert step["fr-lockstep"] == pytest.approx(NETWORK if K == 1 else 1 + 3 / K)
    assert step["dni"] == pytest.approx(NETWORK / K if K == 1 else 4 / K)
    balanced = ideal(K, last_stage_weight=3 / 4)
    assert step_of(schedules.features_replay(balanced, steps)) == pytest.approx(12 / (3 * K + 1))
    for M in (2, 3 * K):  # what waits with one micro-batch waits; each device makes one update of 0.1 s
        for name in ("bp", "ddg", "fr"):
            times = ideal(K, last_stage_weight=3 / 4 if name == "fr" else 1.0, parts=M)
            times = times._replace(stages=tuple(one._replace(update=0.1) for one in times.stages))
            made = step_of(SCHEDULES[name](times, steps, M))
            one = 12 / (3 * K + 1) if name == "fr" else step[name]
            assert made == pytest.approx(one + 0.1), (name, M)
    for M in (1, 3, 8):
        timeline = simulate(gpipe(ideal(K, parts=M), 4, M))
        assert summarise(timeline).step_seconds == pytest.approx(NETWORK * (M + K - 1) / (K * M))
        assert summarise(timeline).bubble == pytest.approx(1 - M / (M + K - 1))


@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_transfers_lengthen_the_loops_that_have_no_slack(K):
    x, steps = 0.07, 20 * K
    balanced = ideal(K, last_stage_weight=3 / 4, transfers=x)
    assert step_of(schedules.features_replay(balanced, steps)) == pytest.approx(12 / (3 * K + 1) + 2 * x * (K - 1) / K)
    assert step_of(schedules.ddg(ideal(K, transfers=x), steps)) == pytest.approx(3 / K + 2 * x * (K - 1) / K)
    assert step_of(schedules.back_propagation(ideal(K, transfers=x), 4)) == pytest.approx(3 + 2 * x * (K - 1))


def test_bubbles_of_features_replay():
    """Balanced: none. Equally cut: stage K works 3 of 4, the others all the time."""
    assert summarise(simulate(schedules.features_replay(ideal(4, last_stage_weight=3 / 4), 28))).bubble < 1e-9
    found = summarise(simulate(schedules.features_replay(ideal(4), 40)))
    assert found.bubbles == pytest.approx((0, 0, 0, 1 / 4), abs=1e-9)
    assert found.bubble == pytest.approx(1 / 16)


def test_data_parallelism():
    assert ring_all_reduce_seconds(4e6, devices=4, bandwidth=1e6) == pytest.approx(2 * 3)
    assert ring_all_reduce_seconds(4e6, devices=1, bandwidth=1e6) == 0
    found = summarise(simulate(data_parallel(3.0 / 4, 4, steps=4, all_reduce=0.25)))
    assert found.step_seconds == pytest.approx(1.0) and found.bubble == pytest.approx(0.25)


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_nothing_overlaps_and_nothing_comes_too_early(K, share):
    for schedule in all_schedules(uneven(K, seed=K), steps=7):
        timeline = simulate(occupying(schedule, share))
        free = {}
        for i, task in enumerate(timeline.schedule):
            assert timeline.end[i] == pytest.approx(timeline.start[i] + task.seconds)
            assert timeline.start[i] >= free.get(task.device, 0.0)
            free[task.device] = timeline.end[i]
            for j, seconds in task.needs:
                assert timeline.start[i] >= timeline.end[j] + seconds - 1e-9
        links = {}
        for one in timeline.transfers:
            assert one.start >= links.get((one.source, one.target), 0.0) and one.end > one.start
            links[one.source, one.target] = one.end


def test_every_stage_works_on_every_mini_batch_in_order():
    K, steps = 4, 10
    tasks = schedules.features_replay(uneven(K, seed=0), steps)
    for k in range(K - 1):
        assert [task.minibatch for task in tasks if task.kind == "play" and task.device == k] == list(range(steps))
        replayed = [(task.step, task.minibatch) for task in tasks if task.kind == "replay" and task.device == k]
        staleness = K - 1 - k
        assert replayed == [(t, t - staleness) for t in range(staleness, steps)]


def test_a_link_carries_one_message_at_a_time():
    sent = [Task("forward", 0, 1.0, t, t) for t in range(3)]
    received = [Task("last", 1, 0.5, t, t, (Need(t, 2.0),)) for t in range(3)]
    assert simulate([*sent, *received]).start[3:].tolist() == [3.0, 5.0, 7.0]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_transfers_that_occupy_both_devices(share):
    """A ring of two: without occupation the step is 2 + 2 x, and it stays so if only the wire has slack."""
    x = 0.4
    times = Times((StageTimes(forward=1, backward=1, update=0), StageTimes(last=2)), (x,), (x,))
    plain = schedules.back_propagation(times, 6)
    assert step_of(occupying(plain, share)) == pytest.approx(step_of(plain))
    busy = schedules.ddg(Times((StageTimes(forward=1, backward=1, update=0), StageTimes(last=2)), (x,), (x,)), 40)
    assert step_of(occupying(busy, share)) >= 2 + 2 * share * x - 1e-9
    assert occupying(plain, 0.0) == plain


def test_simulating_64_devices_is_quick():
    start = time.process_time()
    found = summarise(simulate(schedules.features_replay(ideal(64, last_stage_weight=3 / 4), 200)))
    assert NETWORK / found.step_seconds == pytest.approx((3 * 64 + 1) / 4)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate([Task("play", 0, math.nan, 3, 0)]), "play of mini-batch 3 on device 0, takes nan s"),
        (lambda: simulate([Task("play", 0, 1.0, 0, 0, (Need(0),))]), "needs task 0"),
        (lambda: simulate([Task("play", 0, 1, 0, 0), Task("last", 1, 1, 0, 0, (Need(0, -2),))]), "waits -2 s"),
        (lambda: occupying([], 1.5), "share = 1.5"),
        (lambda: summarise(simulate([Task("last", 0, 1.0, 0, 0)])), "skip = 0 of 1 steps"),
        (lambda: summarise(simulate([Task("last", 0, 1.0, t, t) for t in range(2)]), skip=2), "leave at least one"),
        (lambda: schedules.ddg(Times((StageTimes(),) * 3, (1.0,), (1.0,)), 3), "times of 3 stages came with 1"),
        (lambda: schedules.dni(ideal(2), 0), "steps = 0 and microbatches = 1"),
        (lambda: gpipe(ideal(2), 1, 0), "microbatches = 0"),
        (lambda: data_parallel(1.0, 0, 3), "devices = 0"),
        (lambda: times_of_costs([1.0, 2.0], [0.1, 0.1]), "2 transfers were given for 2 stages"),
        (lambda: times_of_costs([]), "no costs"),
        (lambda: balanced_shares(0), "K = 0"),
        (lambda: ring_all_reduce_seconds(1.0, 2, 0.0), "bandwidth = 0.0"),
        (lambda: ring_all_reduce_seconds(1.0, 0, 1.0), "devices = 0"),
    ],
)
def test_errors_say_what_was_given(call, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        call()


def test_summary_of_what_was_skipped():
    timeline: Timeline = simulate([Task("last", 0, 5.0 if t == 0 else 1.0, t, t) for t in range(4)])
    assert summarise(timeline, skip=1).step_seconds == 1.0


def test_a_schedule_that_goes_on():
    """Features replay that starts idle at step 2 with full histories, K = 2: the same as a first step without fill."""
    times = Times((StageTimes(play=1.0, replay=3.0), StageTimes(last=4.0)), (0.5,), (0.5,))
    timeline = simulate(resumed(schedules.features_replay(times, steps=3), 2))
    found = [(task.kind, task.minibatch, end) for task, end in zip(timeline.schedule, timeline.end, strict=True)]
    assert found == [("play", 2, 1.0), ("last", 2, 5.5), ("replay", 1, 4.0)]


def test_a_schedule_says_what_it_reads():
    for name, make in SCHEDULES.items():
        tasks = make(uneven(3, seed=1), 4, 2 if make is gpipe else 1)
        assert set(make.kinds()) == {task.kind for task in tasks}, name


def test_no_device_starts_a_phase_before_all_have_ended_the_one_before():
    timeline = simulate(schedules.features_replay_lockstep(uneven(4, seed=2), 6))
    for t in range(6):
        spans = []
        for kinds in (("play", "forward"), ("backward", "replay")):
            phase = [i for i, task in enumerate(timeline.schedule) if task.step == t and task.kind in kinds]
            spans.append((timeline.start[phase].min(), timeline.end[phase].max()))
        assert spans[0][1] <= spans[1][0]
