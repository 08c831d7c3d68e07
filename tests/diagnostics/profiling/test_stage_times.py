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
from fr_jax.diagnostics.profiling.stage_times import Measured, median, stage_timer
from fr_jax.diagnostics.profiling.watched_steps import STEPS, Call
from fr_jax.diagnostics.simulation.schedules import SCHEDULES
from fr_jax.diagnostics.simulation.timeline import simulate, summarise
from fr_jax.diagnostics.simulation.times import StageTimes, Times
from fr_jax.training.classification import cross_entropy

BATCH = fr.Batch(np.ones((8, 20), np.float32), np.zeros(8, np.int32))
STAGES = fr.partition(fr.models.mlp(depth=3, width=8), (1, 2))
K = len(STAGES)
SETTING = STAGES, cross_entropy, optax.sgd(0.1, momentum=0.9), BATCH
SYNTHESIZERS = {"synthesizers": fr.models.synthesizer(), "synthesizer_optimizer": optax.adam(1e-3)}

# What the schedule of each method reads: of the stages k < K, and of stage K.
KINDS = {
    "bp": ({"forward", "backward", "update"}, {"last"}),
    "fr": ({"play", "replay"}, {"last"}),
    "fr-lockstep": ({"play", "replay"}, {"forward", "backward", "update"}),
    "ddg": ({"forward", "backward", "update"}, {"last"}),
    "dni": ({"forward", "synthesize", "backward", "update", "learn"}, {"last"}),
    "gpipe": ({"forward", "backward", "update"}, {"gradient", "update"}),
    "2bw": ({"forward", "backward", "update"}, {"last"}),
}


def check(measured, below, top):
    """Every stage has the kinds that it should have, and no other; transfers take time."""
    times, share = measured
    assert 0 <= share <= 1 and len(times.features) == len(times.gradients) == K - 1
    assert all(0 < seconds < 10 for seconds in (*times.features, *times.gradients))
    for k, stage in enumerate(times.stages):
        found = {kind for kind, seconds in stage._asdict().items() if not math.isnan(seconds)}
        assert found == (top if k == K - 1 else below)
        assert all(0 < getattr(stage, kind) < 10 for kind in found)


def test_every_method_with_a_schedule_has_a_timer():
    assert set(KINDS) == set(STEPS) == set(SCHEDULES)
    assert {method: set.union(*kinds) for method, kinds in KINDS.items()} == {
        method: set(schedule.kinds()) for method, schedule in SCHEDULES.items()
    }


@pytest.mark.parametrize(
    ("method", "M"),
    [
        *(("bp", 1), ("gpipe", 2), ("fr-lockstep", 1), ("fr", 2)),
        *(pytest.param(method, 2, marks=pytest.mark.slow) for method in ("bp", "ddg")),
    ],
)
def test_the_parts_of_a_step_are_those_of_the_schedule(method, M):
    options = {"placement": fr.placement(K), "microbatches": M, "repeats": 1, "hops": 1}
    measured = stage_timer([method], *SETTING, in_step=True, **options)()
    below, top = KINDS[method] if M == 1 else (KINDS[method][0] | {"update"}, {"gradient", "update"})
    check(measured, below, top)
    schedule = SCHEDULES[method](measured.times, 2 * K, M)
    assert 0 < summarise(simulate(schedule)).step_seconds < 10
    assert set(SCHEDULES[method].kinds(M)) == below | top


def test_what_several_methods_need_is_timed_at_once():
    methods = ["fr", "ddg", "dni"]
    measure = stage_timer(methods, *SETTING, placement=fr.placement(K), repeats=1, hops=2, **SYNTHESIZERS)
    first, second = measure(), measure()
    below, top = (set.union(*(KINDS[method][i] for method in methods)) for i in range(2))
    for measured in (first, second):
        check(measured, below, top)
    for method in methods:
        assert summarise(simulate(SCHEDULES[method](median([first, second]).times, 8))).step_seconds > 0


def test_what_is_measured_is_what_the_method_runs(monkeypatch):
    """The recorded functions of features replay give the method's own numbers, those of step K."""
    seen = {}

    def record(call):
        seen[call.run.__name__, len(seen)] = call.run(*jax.tree.map(jnp.copy, call.arguments))
        return 1.0

    monkeypatch.setattr(Call, "seconds", record)
    stage_timer(["fr"], *SETTING, repeats=1)()
    method = fr.features_replay(*SETTING[:3])
    state = method.init(jax.random.key(0), BATCH)
    for _ in STAGES:
        state, info = method.step(state, BATCH)
    results = {name: result for (name, _), result in seen.items()}
    assert set(results) == {"play", "replay", "train"}
    assert results["train"].loss == info.loss
    np.testing.assert_array_equal(jax.tree.leaves(results["train"].params)[0], jax.tree.leaves(state.params[-1])[0])
    replays = [result for (name, _), result in seen.items() if name == "replay"]
    for k, result in zip(reversed(range(K - 1)), replays, strict=False):
        np.testing.assert_array_equal(jax.tree.leaves(result.params)[0], jax.tree.leaves(state.params[k])[0])


def test_one_stage_is_the_whole_network():
    options = {"placement": fr.placement(1), "repeats": 1}
    measured = stage_timer(["bp"], [fr.chain(*STAGES)], *SETTING[1:], **options)()
    assert measured.times.features == () and measured.times.stages[0].last > 0 and measured.transfer_share == 0
    step = summarise(simulate(SCHEDULES["bp"](measured.times, 4))).step_seconds
    assert step == pytest.approx(measured.times.stages[0].last)


def test_transfers_alone():
    times, _ = stage_timer((), *SETTING, placement=fr.placement(K), hops=1)()
    assert min(times.features) > 0 and all(math.isnan(seconds) for stage in times.stages for seconds in stage)
    times, share = stage_timer((), *SETTING, placement=fr.placement(K, jax.devices()[:1]))()
    assert times.features == (0.0, 0.0) and share == 0


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["fr", "dance"], {}, r"methods = \['fr', 'dance'\] were given; give a sequence, each one of bp, fr, "),
        ("fr", {}, "methods = 'fr' were given; give a sequence"),
        (["fr", "bp"], {"in_step": True}, "give one method"),
        (["bp"], {}, "single device is one function"),
        (["dni"], {}, "pass both"),
        (["dni"], {"synthesizers": (), "synthesizer_optimizer": optax.sgd(1.0)}, "0 synthesizers"),
        (["fr"], {"repeats": 0}, "repeats = 0"),
        (["fr"], {"hops": 0}, "hops = 0"),
        (["gpipe"], {"microbatches": 0}, "microbatches = 0"),
        (["fr", "dni"], {"microbatches": 2}, r"have \[1, 2\] micro-batches; measure them one by one"),
        (["fr"], {"placement": fr.placement(2)}, "2 entries for K = 3"),
    ],
)
def test_errors_say_what_was_given(methods, options, message):
    with pytest.raises(ValueError, match=message):
        stage_timer(methods, *SETTING, **options)


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
from fr_jax.diagnostics.profiling.stage_times import stage_timer
from fr_jax.training.classification import cross_entropy
distributed.initialize()
batch = fr.Batch(np.ones((8, 20), np.float32), np.zeros(8, np.int32))
stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
setting = (stages, cross_entropy, optax.sgd(0.1), batch)
measure = stage_timer(["fr", "bp"], *setting, placement=fr.placement(2), repeats=1, hops=3)
measure()
found = measure()
stage_timer(["ddg"], *setting, placement=fr.placement(2))()
stage_timer(["gpipe"], *setting, placement=fr.placement(2), in_step=True, microbatches=2)()
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
