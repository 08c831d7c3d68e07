import importlib.util
import json
import os
import subprocess
import sys

import pytest

from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments.pytorch_peers import __main__ as peers
from fr_jax.experiments.pytorch_peers import steps
from fr_jax.experiments.pytorch_peers.__main__ import PeersSettings
from fr_jax.experiments.pytorch_peers.steps import Job

TINY = "--model gpt --depth 2 --width 16 --heads 2 --context 8 --batch-size 8 --rounds 2 --steps 1".split()  # noqa: SIM905


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "fr"], "--methods fr is unknown; it can be bp, gpipe, 1f1b, ddp"),
        (["--model", "mlp"], "--model mlp is unknown; it can be resnet8"),
        (["--microbatches", "2", "3"], "--batch-size 128 cannot be split into the 3 equal parts of --microbatches 3"),
        (["--microbatches", "1"], "--microbatches 1 are too few for the --K 2 stages of 1f1b"),
        (["--K", "3", "--microbatches", "4"], "--batch-size 128 cannot be split into the 3 equal parts of ddp"),
        (
            ["--model", "gpt", "--width", "68"],
            "--width 68 cannot be split into --heads 4 of even width",
        ),
        (["--cuts", "1", "2"], "--cuts 1 2 make 3 stages, and --K is 2"),
        (["--K", "4096", "--pinned", "--methods", "gpipe"], "--pinned needs 4096 cores for --K 4096"),
        (["--output", "peers"], "--output peers does not end in .json; it must be the name of a JSON file. Try"),
    ],
)
def test_bad_arguments_are_one_message(arguments, said, installed, capsys):
    assert peers.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_says_what_to_do_without_pytorch(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.main([]) == 2
    assert "which is not installed here. Install it: pip install 'fr_jax[pytorch]'." in capsys.readouterr().err


def test_runs_in_k_processes_only(installed):
    with pytest.raises(SettingsError, match="--K 2 runs in 2 processes, and this is one of 1"):
        peers.run(PeersSettings())


def test_cuts_around_the_balanced_ones(monkeypatch):
    job = Job(lambda: None, None, None, "sgd")
    monkeypatch.setattr(Job, "layers", lambda self: [None] * 6)
    monkeypatch.setattr(steps, "layer_seconds", lambda job, examples: [4.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    assert peers.cuts_to_try(PeersSettings(), job) == [(2,), (3,), (4,)]
    assert peers.cuts_to_try(PeersSettings(K=3), job) == [(1, 3), (1, 4), (1, 5), (2, 4)]
    assert peers.cuts_to_try(PeersSettings(cuts=(5,)), job) == [(5,)]
    with pytest.raises(SettingsError, match="--cuts 6 must be increasing places between the 6 layers of --model resn"):
        peers.cuts_to_try(PeersSettings(cuts=(6,)), job)


def test_micro_batches_and_layouts_train_the_same():
    torch = pytest.importorskip("torch")
    settings = PeersSettings(model="gpt", depth=1, width=16, heads=2, context=8, batch_size=4)
    job = peers.make_job(settings)
    whole, parts = steps.backprop(job, 1), steps.backprop(job, 4)
    for _ in range(3):
        torch.testing.assert_close(whole(), parts(), rtol=1e-5, atol=1e-5)
    job = peers.make_job(PeersSettings(model="resnet8", batch_size=4))
    contiguous, last = steps.backprop(job, 2), steps.backprop(job._replace(channels_last=True), 2)
    for _ in range(2):
        torch.testing.assert_close(contiguous(), last(), rtol=1e-3, atol=1e-3)
    assert (
        set(steps.trial({"contiguous": job}, 2, rounds=1)) == {"contiguous"}
        and len(steps.layer_seconds(job, 2, rounds=1)) == 5
    )


@pytest.mark.slow
def test_pipelines_and_data_parallelism_in_two_processes(tmp_path, program_env):
    pytest.importorskip("torch")
    output = tmp_path / "peers.json"
    command = [sys.executable, "-m", "fr_jax.experiments.pytorch_peers", *TINY, "--cuts", "3", "--output", str(output)]
    done = subprocess.run(command, env=program_env, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    result = json.loads(output.read_text())
    assert result["cores_by_process"] == [sorted(os.sched_getaffinity(0))] * 2
    rows = result["results"]
    names = [(row["method"], row["microbatches"]) for row in rows.values()]
    assert names == [("bp", 1), *((m, M) for m in ("bp", "gpipe", "1f1b") for M in (2, 4, 8)), ("ddp", 1)]
    for row in rows.values():  # without batch statistics all of them compute the same gradients
        assert row["loss"] == pytest.approx(next(iter(rows.values()))["loss"], abs=1e-4)
        assert len(row["rounds"]) == 2 and row["best_cuts"] and row["cuts"] == [3] * (row["method"] in steps.SCHEDULES)
