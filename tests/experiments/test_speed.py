import json
import subprocess
import sys

import pytest

from fr_jax.experiments import speed

CONTESTANTS = [
    "plain jitted optax step",
    "back-propagation, 1 device",
    "features replay, K = 1",
    "back-propagation, 2 devices",
    "features replay, K = 2",
]


def check(result):
    assert list(result["results"]) == CONTESTANTS
    assert len(result["cuts"]) == 1
    baseline = result["results"]["back-propagation, 1 device"]
    assert baseline["speedup_over_back_propagation_on_1_device"] == 1
    for row in result["results"].values():
        assert len(row["rounds"]) == result["rounds"] == 3
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["speedup_over_back_propagation_on_1_device"] == pytest.approx(
            baseline["seconds_median"] / row["seconds_median"]
        )


def test_contestants_take_turns_in_one_process(tmp_path, capsys):
    output = tmp_path / "speed.json"
    assert speed.main(["--model", "mlp", "--rounds", "3", "--steps", "2", "--output", str(output)]) == 0
    check(json.loads(output.read_text()))
    assert "bound for features replay at K = 2: 1.75" in capsys.readouterr().out


@pytest.mark.slow
def test_one_pinned_process_a_stage(tmp_path, program_env):
    output = tmp_path / "speed.json"
    command = [sys.executable, "-m", "fr_jax.experiments.speed", "--pinned", "--model", "mlp", "--rounds", "3"]
    done = subprocess.run([*command, "--output", str(output)], env=program_env, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    check(json.loads(output.read_text()))
