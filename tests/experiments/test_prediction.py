"""The program that predicts a step and measures it, ``fr_jax.experiments.prediction``."""

import json
import subprocess
import sys

import jax
import pytest

from fr_jax.experiments._cli.settings import SharedSettings
from fr_jax.experiments.prediction import __main__ as prediction
from fr_jax.experiments.prediction.methods import timer_of

SMALL = ["--model", "mlp", "--batch-size", "8", "--rounds", "2", "--steps", "2"]


def check(output, methods):
    assert sorted(path.name for path in output.iterdir()) == ["prediction.json", "prediction.png"]
    assert (output / "prediction.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((output / "prediction.json").read_text())
    assert set(result["results"]) == {prediction.ONE, *methods}
    for row in result["results"].values():
        assert len(row["rounds"]["predicted"]) == len(row["rounds"]["measured"]) == 2
        # No bound on the error: tests run on machines that do other things as well.
        assert row["predicted_over_measured"] == pytest.approx(row["predicted_seconds"] / row["measured_seconds"])
        assert 0 < row["predicted_steady_seconds"] < 10 and 0 <= row["predicted_bubble"] < 1
    return result


@pytest.mark.slow
def test_predicts_and_measures_all_methods_in_one_process(tmp_path, capsys):
    output, methods = tmp_path / "new", ["fr", "fr-lockstep", "ddg", "dni", "gpipe", "dp", "bp"]
    assert prediction.main([*SMALL, "--methods", *methods, "--cuts", "2", "--output", str(output)]) == 0
    result = check(output, methods)
    assert result["cuts"] == [2] and set(result["parts"]) == {
        prediction.ONE,
        *(timer_of(name, SharedSettings()) for name in methods),
    }
    assert result["parts"]["data parallelism's step"]["all_reduce_seconds"] > 0
    assert set(result["parts"]["at once"]["modules"][1]) == {"last"}  # all that their schedules read
    assert "predicted s" in capsys.readouterr().out
    assert prediction.main([*SMALL, "--output", str(output)]) == 2
    assert "has prediction.json, prediction.png already. Add --overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_one_process_a_stage(tmp_path, program_env):
    output = tmp_path / "output"
    command = [sys.executable, "-m", "fr_jax.launch", "--processes", "2", "--no-pin", "--"]
    command += ["-m", "fr_jax.experiments.prediction", *SMALL, "--output", str(output)]
    done = subprocess.run(command, env=program_env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert check(output, ["fr", "ddg", "bp"])["processes"] == 2


def test_fewer_devices_than_stages(monkeypatch, capsys):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    assert prediction.main([*SMALL, "--K", "2"]) == 2
    assert (
        "--K 2 stages need a device each, and JAX sees 1 (cpu). Use at most --K 1, or call" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet21"], "--model resnet21 is unknown; it can be mlp"),
        (["--steps", "0"], "--steps 0 is out of range; it must be at least 1"),
        (["--K", "40"], "--K 40: resnet20 has 11 layers"),
        (["--cuts", "0"], "--cuts 0: give K-1 = 1 increasing places, 1 to 10"),
        (["--K", "3", "--cuts", "4", "2"], "--cuts 4 2: give K-1 = 2 increasing places"),
        (["--K", "3", "--methods", "dp"], "--batch-size 128 cannot be split into the 3 equal parts of dp"),
        (["--K", "1", "--methods", "dp"], "Use --K 2 or more, or leave dp out of --methods"),
        (["--K", "1"], "--K 1: back-propagation on one device is always there. Use --K 2 or more"),
        (
            ["--methods", "gpipe", "--microbatches", "3"],
            "--batch-size 128 cannot be split into the 3 equal parts of gpipe",
        ),
    ],
)
def test_bad_settings_end_with_2(arguments, message, capsys):
    assert prediction.main(arguments) == 2
    assert message in capsys.readouterr().err
