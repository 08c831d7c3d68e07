"""The program that counts, ``fr_jax.experiments.chain_rule``."""

import json
import subprocess
import sys

import pytest

from fr_jax.experiments import chain_rule

SMALL = [
    "--chain",
    "1",
    "4",
    "16",
    "--depths",
    "1",
    "2",
    "--width",
    "3",
    "--widths",
    "2",
    "--depth",
    "2",
    "--repeats",
    "1",
]


def test_writes_counts_and_a_picture(tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    assert chain_rule.main([*SMALL, "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["counts.json", "counts.png"]
    assert (output / "counts.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((output / "counts.json").read_text())
    chain = result["growth"]["chain"]
    assert [row["size"] for row in chain["rows"]] == [1, 4, 16]
    for row in chain["rows"]:
        T = row["size"]
        assert (row["edges"], row["nodes"], row["forward"]) == (T + 1, T + 2, T + 1)
        assert row["naive"]["multiplications"] == T * (T + 1) // 2
        assert row["backpropagation"]["multiplications"] == 2 * T - 1
        assert row["naive"]["seconds"] > 0
    assert 1 < chain["slopes"]["backpropagation"]["multiplications"] < chain["slopes"]["naive"]["multiplications"] < 2.5
    assert result["growth"]["width"]["slopes"]["naive"] == {"multiplications": None, "seconds": None}
    printed = capsys.readouterr().out
    assert "the lecture's chain" in printed and "136" in printed


def test_loads_neither_orbax_nor_the_data_and_training_rooms(program_env):
    """It needs NumPy and Matplotlib. The package itself brings JAX, Flax and optax."""
    code = f"import sys; from fr_jax.experiments import chain_rule; chain_rule.main({SMALL}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=program_env, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    unwanted = ("fr_jax.data", "fr_jax.training", "fr_jax.diagnostics", "fr_jax.experiments._methods")
    assert loaded.isdisjoint({"orbax", "orbax.checkpoint", "sklearn", "pooch", *unwanted})
    assert "fr_jax.reference.chain_rule" in loaded


def test_without_output_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert chain_rule.main(SMALL) == 0
    assert list(tmp_path.iterdir()) == []
    assert "ReLU network, 3 nodes a layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chain", "4", "2"], "--chain 4 2: give one or more increasing values, each at least 1"),
        (["--widths", "0"], "--widths 0 is out of range; each must be at least 1"),
        (["--depth", "0"], "--depth 0 is out of range; it must be at least 1"),
        (["--repeats", "-1"], "--repeats -1 is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range"),
    ],
)
def test_bad_settings_end_with_2(arguments, message, capsys):
    assert chain_rule.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_output_that_is_a_file_ends_with_2(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    assert chain_rule.main([*SMALL, "--output", str(path)]) == 2
    assert f"--output {path} cannot be a folder: File exists" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_malformed_flags_end_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        chain_rule.main(["--depth", "many"])
    assert end.value.code == 2
