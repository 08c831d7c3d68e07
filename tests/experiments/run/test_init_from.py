"""A run goes on with another K, and with another method, from where it was."""

import json
import pathlib

import numpy as np
import pytest

from fr_jax.experiments.mnist import main
from fr_jax.training.metrics_log import read_rows

SMALL = ["--dataset=digits", "--depth=4", "--width=8", "--batch-size=64", "--log-every=1", "--milestones", "0.5"]
SMALL += ["--test-examples", "64"]
RATE = ["--learning-rate", "0.05"]

pytestmark = pytest.mark.usefixtures("no_pictures")


def losses(folder: pathlib.Path) -> dict[int, float]:
    return {row["step"]: row["train_loss"] for row in read_rows(folder / "metrics.jsonl") if "train_loss" in row}


def train(folder: pathlib.Path, method: str, K: int, steps: int, *more: object) -> int:
    words = [*SMALL, "--method", method, "--K", K, "--steps", steps, "--workdir", folder, *more]
    return main([*map(str, words)])


@pytest.fixture(scope="module", params=[pytest.param("sgd", marks=pytest.mark.slow), "muon"])
def optimizer(request):
    return ["--optimizer", request.param, *RATE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, optimizer):
    """Twenty steps of back-propagation: a state of which nothing is in flight."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder, "bp", 2, 20, *optimizer) == 0
    return folder


def test_back_propagation_goes_on_as_if_it_had_never_stopped(whole, optimizer, tmp_path, capsys):
    """Weights, momentum, and the number of updates, at which the learning rate falls (step 11), all come along."""
    assert train(tmp_path / "first", "bp", 3, 10, *optimizer) == 0
    capsys.readouterr()
    assert train(tmp_path / "second", "bp", 2, 20, *optimizer, "--init-from", tmp_path / "first") == 0
    line = f"Going on from step 10 of {tmp_path / 'first'} (K = 3): weights, statistics and optimizer state; "
    assert line + "what is in flight starts empty." in capsys.readouterr().out
    expected, found = losses(whole), losses(tmp_path / "second")
    assert list(found) == list(range(11, 21))
    np.testing.assert_allclose([*found.values()], [expected[step] for step in found], rtol=2e-4)
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["steps"] == 20


def test_features_replay_goes_on_with_another_K_where_the_loss_was(tmp_path, capsys):
    assert train(tmp_path / "two", "fr", 2, 60, "--optimizer", "adamw") == 0
    words = ["--optimizer", "adamw", "--init-from", tmp_path / "two", "--checkpoint-every", 70]
    assert train(tmp_path / "four", "fr", 4, 80, *words) == 0
    before, after = losses(tmp_path / "two"), losses(tmp_path / "four")
    late = np.mean([*before.values()][-10:])
    assert abs(np.mean([after[step] for step in range(61, 71)]) - late) < 0.25 * (before[1] - late)
    capsys.readouterr()
    assert train(tmp_path / "two", "fr", 4, 80, "--optimizer", "adamw", "--resume") == 2
    assert "--K is 4 and was 2 (to go on with another K, start a run in another folder with --init-from this one)" in (
        capsys.readouterr().err
    )
    assert train(tmp_path / "sgd", "ddg", 3, 61, "--init-from", tmp_path / "two") == 0
    assert "weights and statistics (another optimizer); what is in flight" in capsys.readouterr().out


def test_what_cannot_be_gone_on_from(whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = [
        (["--init-from", tmp_path / "empty"], "holds no run"),
        (["--init-from", whole], "has done 20 steps, and this run is to end after 5. Ask for more"),
        (["--init-from", whole, "--width", 9], "is a run of --model mlp --depth 4 --width 8 --dropout-rate 0.0 on dig"),
    ]
    for words, said in cases:
        assert train(tmp_path / "never" / "run", "bp", 1, 5, *words) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "never").exists()
