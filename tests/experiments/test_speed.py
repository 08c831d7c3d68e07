import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

import fr_jax as fr
from fr_jax.experiments._bench.contestants import BASELINE, OPTIMIZERS, make_entry, shared_settings
from fr_jax.experiments._cli.settings import SharedSettings, own_of_method
from fr_jax.experiments._fields import guard
from fr_jax.experiments.speed import __main__ as speed

CONTESTANTS = {
    "plain jitted optax step": 1,
    "back-propagation, 1 device": 1,
    "features replay, K = 1": 1,
    "back-propagation, 2 devices": 1,
    "features replay, K = 2": 1.75,
    "DDG, K = 2": 2,
    "GPipe, K = 2, M = 4": 1.6,
    "data parallelism, 2 devices": 2,
}


def check(result, processes, batch_size=128):
    assert {name: row["bound"] for name, row in result["results"].items()} == CONTESTANTS
    baseline = result["results"][BASELINE]
    assert baseline["speedup"] == 1
    for name, row in result["results"].items():
        assert len(row["rounds"]) == result["rounds"] == 3
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["speedup"] == pytest.approx(baseline["seconds_median"] / row["seconds_median"])
        assert row["share_of_bound"] == pytest.approx(row["speedup"] / row["bound"])
        assert row["host_seconds_median"] > 0 and row["host_cpu_seconds_median"] >= 0
        assert row["host_share_of_step"] == row["host_seconds_median"] / row["seconds_median"]
        assert len(row["busy_seconds_median_by_process"]) == processes
        assert len(row["cuts"]) == (name in [*CONTESTANTS][3:7])
    (transfer,) = result["transfers"]
    assert transfer["cut"] == result["results"]["features replay, K = 2"]["cuts"][0]
    assert transfer["bytes"] == batch_size * 256 * 4 and transfer["seconds"] > 0


def test_contestants_take_turns_in_one_process(tmp_path, capsys):
    output = tmp_path / "speed.json"
    arguments = ["--model", "mlp", "--batch-size", "16", "--rounds", "3", "--steps", "2", "--output", str(output)]
    assert speed.main(arguments) == 0
    check(json.loads(output.read_text()), processes=1, batch_size=16)
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "features replay, K = 2" in printed and "a feature of 0.02 MB at cut 1 takes" in printed


@pytest.mark.slow
def test_given_cuts_and_methods_without_a_bound(capsys):
    settings = speed.SpeedSettings(
        model="mlp", K=3, cuts=(2, 3), methods=("blockprop",), rounds=1, steps=1, batch_size=8
    )
    result = speed.run(settings)
    row = result["results"]["BlockProp, K = 3"]
    assert row["cuts"] == [2, 3] and row["bound"] is row["share_of_bound"] is None
    assert [one["cut"] for one in result["transfers"]] == [2, 3]
    assert result["placement"] == "devices of one process" and len(result["cores_by_process"]) == 1


def test_stages_that_share_a_device_have_no_bound():
    layers = fr.models.mlp(depth=3, width=8)
    shared = SharedSettings(model="mlp", batch_size=8)
    entry = make_entry(shared, layers, "fr", 2, cuts=(1,), devices=jax.devices()[:1])
    assert (entry.contestant.name, entry.bound) == ("features replay, K = 2, devices shared", None)
    assert make_entry(shared, layers, "fr", 2, cuts=(1,)).bound == 1.75


def test_contestants_train_with_the_optimizer_that_is_asked_for():
    layers, more = fr.models.mlp(depth=2, width=4), {}
    for optimizer in ("sgd", "adamw"):
        shared = SharedSettings(model="mlp", batch_size=8, optimizer=optimizer, balance="uniform")
        state = make_entry(shared, layers, "fr", 2).contestant.carry
        more[optimizer] = len(jax.tree.leaves(state.opt_state)) - len(jax.tree.leaves(state.params))
    assert more["sgd"] == 0 < more["adamw"]  # one momentum; two, and a count
    of_a_run = next(field for field in dataclasses.fields(SharedSettings) if field.name == "optimizer")
    assert guard(of_a_run).choices == tuple(OPTIMIZERS)


def test_each_number_of_micro_batches_is_timed():
    methods = ("fr", "dni", "gpipe", "dp")
    settings = speed.SpeedSettings(methods=methods, microbatches=("1", "8", "gpipe=2"))
    timed = [(method, own_of_method(shared, "gpipe")["microbatches"]) for method, shared in speed.timed(settings)]
    assert timed == [("fr", 1), ("fr", 8), ("dni", 4), ("gpipe", 2), ("dp", 4)]
    layers, (_, shared) = fr.models.mlp(depth=3, width=8), speed.timed(settings)[1]
    entry = make_entry(shared, layers, "fr", 2, cuts=(1,))
    assert (entry.contestant.name, entry.bound) == ("features replay, K = 2, M = 8", 1.75)
    assert make_entry(shared, layers, "dp", 2).contestant.name == "data parallelism, 2 devices"


def test_variants_of_a_method_are_timed():
    settings = speed.SpeedSettings(methods=("fr-stashed", "1f1b"), microbatches=("2", "1f1b=4"))
    layers = fr.models.mlp(depth=3, width=8)
    made = [make_entry(shared, layers, method, 2, cuts=(1,)) for method, shared in speed.timed(settings)]
    names = [entry.contestant.name for entry in made]
    assert names == ["features replay, stashed weights, K = 2, M = 2", "1F1B, K = 2, M = 4"]
    plain = make_entry(shared_settings(settings, microbatches=None), layers, "fr", 2, cuts=(1,))
    stashed, current = (len(jax.tree.leaves(entry.contestant.carry)) for entry in (made[0], plain))
    assert stashed > current  # weights of the plays


def test_the_networks_own_settings_count(capsys):
    flags = ["--model", "gpt", "--width", "8", "--context", "6", "--depth", "1", "--batch-size", "2"]
    assert speed.main([*flags, "--methods", "fr", "--rounds", "1", "--steps", "1", "--balance", "uniform"]) == 0
    assert "a feature of 0.00 MB at cut 2" in capsys.readouterr().out  # 2 x 6 x 8 numbers, of four layers
    assert speed.main(["--width", "8"]) == 2
    assert "--width 8 is a setting of --model mlp and gpt, not of resnet20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--microbatches", "3"], "cannot be split into the 3 equal parts of bp"),
        (["--microbatches", "fr=0"], "--microbatches fr=0: fr=0 is malformed"),
        (["--K", "9", "--methods", "2bw"], "--microbatches 8 are too few for the --K 9 stages of 2bw"),
        (["--methods", "eqprop"], "eqprop trains the network in one piece: there are no stages to look at"),
        (["--model", "resnet21"], "--model resnet21 is unknown"),
        (["--methods", "frr"], "--methods frr is unknown"),
        (["--rounds", "0"], "--rounds 0 is out of range"),
        (["--batch-size", "130"], "cannot be split into the 4 equal parts of gpipe"),
        (["--model", "mlp", "--K", "7", "--methods", "fr", "--balance", "flops"], "K = 7 stages were asked of"),
        (["--K", "4096", "--pinned", "--methods", "fr"], "--pinned needs 4096 cores for --K 4096"),
        (["--cuts", "1", "2"], "--cuts 1 2 make 3 stages, and --K is 2; K stages need K-1 = 1 cuts"),
        (["--K", "1", "--cuts", "1", "2"], "--cuts 1 2 make 3 stages, and --K is 1"),
        (["--K", "1", "--methods", "fr", "ddg"], "--K 1 --methods fr ddg: with one stage every method is back-prop"),
    ],
)
def test_bad_arguments_are_one_message(arguments, said, capsys):
    assert speed.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_one_pinned_process_a_stage(tmp_path, program_env):
    output = tmp_path / "speed.json"
    command = [sys.executable, "-m", "fr_jax.experiments.speed", "--pinned", "--model", "mlp", "--rounds", "3"]
    done = subprocess.run([*command, "--output", str(output)], env=program_env, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    result = json.loads(output.read_text())
    check(result, processes=2)
    cores = sorted(os.sched_getaffinity(0))
    assert result["cores_by_process"] == [[core] for core in cores[:2]]
    refused = subprocess.run([*command, "--output", str(output)], env=program_env, capture_output=True, timeout=100)
    assert refused.returncode == 2 and b"speed.json, speed.png already. Add --overwrite" in refused.stderr
