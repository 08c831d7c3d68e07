"""Measured times: which there are, that they are of the right functions, and that processes agree on them."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.diagnostics.profiling.stage_calls import Call
from fr_jax.diagnostics.profiling.stage_times import KINDS_OF, Measured, median, stage_timer
from fr_jax.diagnostics.profiling.step_times import step_timer
from fr_jax.diagnostics.simulation import schedules
from fr_jax.diagnostics.simulation.timeline import simulate, summarise
from fr_jax.diagnostics.simulation.times import StageTimes, Times
from fr_jax.training.classification import cross_entropy

LAST_ONLY, BELOW_ONLY = {"last", "gradient"}, {"play", "replay", "forward", "backward", "synthesize", "learn"}


def setting(batch_size=8):
    batch = fr.Batch(np.ones((batch_size, 20), np.float32), np.zeros(batch_size, np.int32))
    return fr.partition(fr.models.mlp(depth=3, width=8), (1, 2)), cross_entropy, optax.sgd(0.1, momentum=0.9), batch


def test_measures_what_each_method_needs():
    synthesizers = {"synthesizers": fr.models.synthesizer(), "synthesizer_optimizer": optax.adam(1e-3)}
    kinds = set().union(*KINDS_OF.values())
    measure = stage_timer(*setting(), kinds=kinds, placement=fr.placement(3), repeats=1, hops=2, **synthesizers)
    first, second = measure(), measure()
    for times, share in (first, second):
        assert 0 <= share <= 1
        assert all(0 < seconds < 10 for seconds in (*times.features, *times.gradients))
        for k, module in enumerate(times.stages):
            absent = BELOW_ONLY if k == 2 else LAST_ONLY
            for kind, seconds in module._asdict().items():
                assert math.isnan(seconds) if kind in absent else 0 < seconds < 10, (k, kind)
    times = median([first, second]).times
    for name, make in schedules.SCHEDULES.items():
        if name != "fr-lockstep":
            assert summarise(simulate(make(times, 8))).step_seconds > 0
    assert summarise(simulate(schedules.gpipe(times, 4, 2))).step_seconds > 0


def test_what_is_measured_is_what_the_method_runs(monkeypatch):
    """The functions for features replay give the method's own numbers, here of its last module at t = 0."""
    seen = {}

    def record(call):
        result = call.run(*jax.tree.map(jnp.copy, call.arguments))
        seen.setdefault(call.run.__name__, result)
        return 1.0

    monkeypatch.setattr(Call, "seconds", record)
    stages, loss_fn, optimizer, batch = setting()
    stage_timer(stages, loss_fn, optimizer, batch, kinds=KINDS_OF["fr"])()
    method = fr.features_replay(stages, loss_fn, optimizer)
    state, info = method.step(method.init(jax.random.key(0), batch), batch)
    assert seen["train"].loss == info.loss
    np.testing.assert_array_equal(jax.tree.leaves(seen["train"].params)[0], jax.tree.leaves(state.params[-1])[0])
    assert set(seen) == {"play", "replay", "train"}


def test_one_module_is_the_whole_network():
    stages, loss_fn, optimizer, batch = setting()
    measured = stage_timer(
        [fr.chain(*stages)], loss_fn, optimizer, batch, kinds=KINDS_OF["bp"], placement=fr.placement(1), repeats=1
    )()
    assert measured.times.features == () and measured.times.stages[0].last > 0 and measured.transfer_share == 0
    assert summarise(simulate(schedules.back_propagation(measured.times, 4))).step_seconds == pytest.approx(
        measured.times.stages[0].last
    )


def test_one_device_has_no_transfers():
    stages, loss_fn, optimizer, batch = setting()
    alone = fr.placement(3, jax.devices()[:1])
    times, share = stage_timer(stages, loss_fn, optimizer, batch, kinds=["play"], placement=alone, repeats=1)()
    assert times.features == (0.0, 0.0) and share == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["play", "dance"]}, r"kinds \['dance'\] are unknown"),
        ({"kinds": ["learn"]}, "pass both"),
        ({"kinds": ["learn"], "synthesizers": (), "synthesizer_optimizer": optax.sgd(1.0)}, "0 synthesizers"),
        ({"kinds": ["play"], "repeats": 0}, "repeats = 0"),
        ({"kinds": ["play"], "hops": 0}, "hops = 0"),
        ({"kinds": ["play"], "placement": fr.placement(2)}, "2 entries for K = 3"),
    ],
)
def test_errors_say_what_was_given(options, message):
    with pytest.raises(ValueError, match=message):
        stage_timer(*setting(), **options)


def test_median():
    measured = [Measured(Times((StageTimes(play=x), StageTimes(last=x)), (x,), (2 * x,)), x) for x in (0.1, 0.5, 0.9)]
    middle = median(measured)
    assert middle.times.stages[0].play == middle.times.features[0] == middle.transfer_share == 0.5
    assert middle.times.gradients == (1.0,) and math.isnan(middle.times.stages[0].last)
    with pytest.raises(ValueError, match="no measurements"):
        median([])


PROGRAM = """
import json, sys, optax, numpy as np, jax, fr_jax as fr
from fr_jax import distributed
from fr_jax.diagnostics.profiling.stage_times import stage_timer, KINDS_OF
from fr_jax.training.classification import cross_entropy
distributed.initialize()
batch = fr.Batch(np.ones((8, 20), np.float32), np.zeros(8, np.int32))
stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
measure = stage_timer(stages, cross_entropy, optax.sgd(0.1), batch, kinds=KINDS_OF["fr"] + KINDS_OF["bp"],
                      placement=fr.placement(2), repeats=1, hops=3)
measure()
found = measure()
stage_timer(stages, cross_entropy, optax.sgd(0.1), batch, kinds=["update"], placement=fr.placement(2), together=False)()
with open(sys.argv[1] + str(jax.process_index()), "w") as file:
    json.dump([found.times.stages[0].replay, found.times.stages[1].last, found.times.features, found[1]], file)
"""


@pytest.mark.slow
def test_two_processes_tell_each_other(tmp_path, program_env):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "fr_jax.launch", "--processes", "2", "--no-pin", "--", script, tmp_path / "found"]
    done = subprocess.run(command, env=program_env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"found{i}").read_text()) for i in range(2))
    assert first == second
    replay, last, (transfer,), share = first
    assert min(replay, last, transfer) > 0 and jnp.isfinite(transfer) and 0 < share <= 1


@pytest.mark.parametrize(
    ("method", "below", "top"),
    [
        ("bp", {"forward", "backward", "update"}, {"last"}),
        ("gpipe", {"forward", "backward", "accumulate", "update"}, {"gradient", "accumulate", "update"}),
        ("fr-lockstep", {"play", "replay"}, {"forward", "backward", "update"}),
    ],
)
def test_the_parts_of_a_step_are_those_of_the_schedule(method, below, top):
    stages, loss_fn, optimizer, batch = setting()
    K = len(stages)
    measure = step_timer(
        method, stages, loss_fn, optimizer, batch, placement=fr.placement(K), microbatches=2, repeats=1, hops=1
    )
    times, share = measure()
    assert 0 <= share <= 1 and len(times.features) == K - 1 and all(0 < one < 10 for one in times.features)
    for k, module in enumerate(times.stages):
        found = {kind for kind, seconds in module._asdict().items() if 0 < seconds < 10}
        assert found == (top if k == K - 1 else below)
    schedule = schedules.gpipe(times, 4, 2) if method == "gpipe" else schedules.SCHEDULES[method](times, 4)
    assert 0 < summarise(simulate(schedule)).step_seconds < 10


def test_what_has_no_step_timer():
    stages, loss_fn, optimizer, batch = setting()
    with pytest.raises(ValueError, match="it can be bp, gpipe, fr-lockstep"):
        step_timer("fr", stages, loss_fn, optimizer, batch)
    with pytest.raises(ValueError, match="single device is one function"):
        step_timer("bp", stages, loss_fn, optimizer, batch)
