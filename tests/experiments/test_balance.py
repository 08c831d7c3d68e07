import json
import subprocess
import sys

import pytest

from fr_jax.experiments import balance
from fr_jax.experiments._fields import SettingsError


def check(result, cuts):
    assert list(result["results"]) == [",".join(map(str, one)) for one in cuts]
    medians = {tuple(row["cuts"]): row["seconds_median"] for row in result["results"].values()}
    assert medians[tuple(result["best"])] == min(medians.values())
    assert set(result["chosen"]) == {"time", "flops", "uniform"}
    for row in result["chosen"].values():
        expected = medians[tuple(row["cuts"])] / min(medians.values())
        assert row["times_the_best"] == pytest.approx(expected) and expected >= 1
    flops = {cuts: max(row["stage_flops"]) for cuts, row in zip(medians, result["results"].values(), strict=True)}
    assert flops[tuple(result["chosen"]["flops"]["cuts"])] == min(flops.values())


def test_every_cut_is_timed(tmp_path, capsys):
    output = tmp_path / "balance.json"
    assert (
        balance.main(["--model", "mlp", "--batch-size", "8", "--rounds", "1", "--steps", "1", "--output", str(output)])
        == 0
    )
    check(json.loads(output.read_text()), [(cut,) for cut in range(1, 6)])
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "times the best" in capsys.readouterr().out


THREE = balance.BalanceSettings(K=3, model="mlp", method="ddg", first=2, last=4, rounds=1, steps=1, batch_size=8)


def test_cuts_into_three_stages_of_a_part_of_the_network():
    assert balance.choices_of_cuts(THREE, layers=6) == [(2, 3), (2, 4), (3, 4)]


@pytest.mark.slow
def test_three_stages_of_a_part_of_the_network():
    result = balance.run(THREE)
    assert [row["cuts"] for row in result["results"].values()] == [[2, 3], [2, 4], [3, 4]]
    assert result["chosen"]["uniform"] == {
        "cuts": [2, 4],
        "times_the_best": result["results"]["2,4"]["seconds_median"]
        / min(row["seconds_median"] for row in result["results"].values()),
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "resnet164", "K": 4}, "88560 ways at the 82 places .* it must be 1 to 200"),
        ({"model": "mlp", "first": 6}, "0 ways"),
        ({"K": 1}, "--K 1 is out of range; it must be at least 2"),
        ({"model": "mlp", "last": 0}, "0 ways at the 0 places of --model mlp between --first 1 and --last 0"),
        ({"method": "gpipe", "batch_size": 6}, "--batch-size 6 cannot be split into the 4 equal parts of gpipe"),
        ({"method": "dp"}, "--method dp is unknown"),
        ({"steps": 0}, "--steps 0 is out of range"),
    ],
)
def test_what_cannot_be_timed_is_refused(settings, said):
    with pytest.raises(SettingsError, match=said):
        balance.run(balance.BalanceSettings(**settings))


@pytest.mark.slow
def test_one_pinned_process_a_stage(tmp_path, program_env):
    output = tmp_path / "balance.json"
    command = [sys.executable, "-m", "fr_jax.experiments.balance", "--pinned", "--model", "mlp", "--rounds", "1"]
    done = subprocess.run([*command, "--output", str(output)], env=program_env, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    check(json.loads(output.read_text()), [(cut,) for cut in range(1, 6)])
