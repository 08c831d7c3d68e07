"""The program that simulates, ``fr_jax.experiments.scaling``."""

import json

import pytest

from fr_jax.diagnostics.simulation.timeline import simulate, summarise
from fr_jax.experiments.scaling import __main__ as scaling
from fr_jax.experiments.scaling.network import COMPARED as METHODS
from fr_jax.experiments.scaling.network import STEP, Network, ideal, schedule, speedups

SMALL = [
    *("--model", "mlp", "--depth", "5", "--width", "16", "--batch-size", "8", "--K", "1", "2", "4", "8"),
    *("--microbatches", "4", "--ratios", "0.1", "0.001", "--ratio-K", "3", "--timelines", "2", "6"),
]


def test_writes_numbers_and_pictures(tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "folder"
    assert scaling.main([*SMALL, "--output", str(output)]) == 0
    names = ["scaling.json", "scaling.png", "timeline-K2-mlp.png", "timeline-K2.png", "timeline-K6.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in names[1:])
    result = json.loads((output / "scaling.json").read_text())
    assert [row["K"] for row in result["by_K"]] == [1, 2, 4, 8]
    for row in result["by_K"]:
        assert row["ideal"] == pytest.approx(row["bounds"])
        assert set(row["bounds"]) == set(METHODS)
    assert result["by_K"][-1]["model"] is None and result["by_K"][-1]["cuts"] is None
    four = result["by_K"][2]
    assert len(four["cuts"]) == 3
    # The first of five layers is by far the largest: balance cannot come near the bound.
    assert 0.5 < four["model"]["fr"] < four["bounds"]["fr"] and four["model"]["dp"] == pytest.approx(4)
    assert [row["ratio"] for row in result["by_ratio"]] == [0.001, 0.1]
    fast, slow = result["by_ratio"]
    for which in ("ideal", "model"):
        assert all(slow[which][name] <= fast[which][name] + 1e-9 <= 3 for name in METHODS)
    printed = capsys.readouterr().out
    assert "mlp has 5 layers, and cannot be cut into more stages" in printed

    assert scaling.main([*SMALL, "--output", str(output)]) == 2
    assert "scaling.json, scaling.png, timeline-K2.png" in (said := capsys.readouterr().err) and "--overwrite" in said
    monkeypatch.setattr(scaling, "simulated", lambda *settings: result)
    assert scaling.main([*SMALL, "--output", str(output), "--overwrite", "--timelines"]) == 0


def test_without_output_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert scaling.main([*SMALL, "--costs", "time", "--K", "2"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_data_parallelism_wins_where_weights_are_small():
    """The all-reduce moves 2 (D-1)/D of the weights; features replay two features over each cut."""
    small, large = (speedups(ideal(weights), 4, 0.01, M=4) for weights in (0.1, 100.0))
    assert small["dp"] > small["fr"] == large["fr"] > large["dp"]
    assert large["dp"] == pytest.approx(3 / (3 / 4 + 2 * 3 / 4 * 100 * 0.03))


@pytest.mark.parametrize("ratio", [0.01, 1.0])
@pytest.mark.parametrize("K", [2, 4, 8])
def test_speedups_with_transfers_are_the_closed_forms(K, ratio):
    """A mini-batch's features, and its gradient, cross each cut in x seconds; the loop over a cut has no slack."""
    x, found = ratio * STEP, speedups(ideal(1.0), K, ratio, M=4)
    assert STEP / found["fr"] == pytest.approx(12 / (3 * K + 1) + 2 * x * (K - 1) / K)
    assert STEP / found["ddg"] == pytest.approx(STEP / K + 2 * x * (K - 1) / K)
    assert STEP / found["bp"] == pytest.approx(STEP + 2 * x * (K - 1))


@pytest.mark.parametrize("K", [2, 3, 4])
def test_speedups_are_those_of_a_long_run(K):
    shares = (0.1, 0.5, 0.4, 0.7, 0.6, 0.7)
    network = Network(shares, (1.5, 0.5, 1.2, 0.8, 1.0), (0.1, 0.2, 0.1, 0.2, 0.1), 1.0, 1.0)
    for name, speedup in speedups(network, K, 0.05, M=4).items():
        long = simulate(schedule(name, network, K, 0.05, 4, steps=40 * K))
        assert STEP / speedup == pytest.approx(summarise(long, skip=20 * K).step_seconds), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet20x"], "--model resnet20x is unknown; it can be mlp, resnet8"),
        (["--depth", "3"], "--depth is a setting of --model mlp and gpt, not of resnet110"),
        (["--model", "mlp", "--depth", "1"], "--depth 1 leaves nothing to cut; give 2 or more"),
        (["--K", "4", "2"], "--K 4 2: give increasing whole numbers"),
        (["--timelines", "0"], "--timelines 0: give increasing whole numbers, each 1 or more"),
        (["--ratio-K", "0"], "--ratio-K 0: give 1 or more"),
        (["--microbatches", "0"], "--microbatches 0: give 1 or more"),
        (["--ratios", "0.1", "0"], "--ratios 0.1 0.0: give one or more finite numbers above 0"),
        (["--ratio", "-1"], "--ratio -1.0: give a finite number, 0 or more"),
    ],
)
def test_bad_settings_end_with_2(arguments, message, capsys):
    assert scaling.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_output_that_is_a_file_ends_with_2(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    assert scaling.main([*SMALL, "--output", str(path)]) == 2
    assert f"--output {path} cannot be a folder: File exists" in capsys.readouterr().err


def test_malformed_flags_end_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        scaling.main(["--depth", "many"])
    assert end.value.code == 2
