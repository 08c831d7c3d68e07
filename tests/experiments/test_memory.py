"""The program that compares memory, ``fr_jax.experiments.memory``."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.diagnostics.memory.step_memory import KINDS
from fr_jax.experiments.memory import __main__ as memory
from fr_jax.experiments.memory.methods import CONTESTANTS, checkpointed, recomputing
from fr_jax.experiments.memory.picture import figure

SMALL = ["--models", "mlp", "--K", "1", "2", "--batch-size", "8"]


def test_every_contestant_in_numbers_and_a_picture_once(tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "folder"
    arguments = [*SMALL, "--methods", *CONTESTANTS, "--output", str(output)]
    assert memory.main(arguments) == 0
    assert sorted(path.name for path in output.iterdir()) == ["memory.json", "memory.png"]
    assert (output / "memory.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((output / "memory.json").read_text())
    rows = {(row["K"], row["method"]): row for row in result["rows"]}
    assert len(rows) == 2 * len(CONTESTANTS)
    assert rows[1, "bp"]["ratio"] == rows[1, "ddg"]["ratio"] == 1
    for (K, name), row in rows.items():
        assert row["total"] == sum(row["peak"].values()) == sum(sum(d["peak"].values()) for d in row["devices"])
        assert row["activations"] < row["total"]
        assert len(row["stages"]) == row["K"] == len(row["cuts"]) + 1
        assert len(row["devices"]) == (1 if CONTESTANTS[name].one_device else K)
        assert {"name", "temporaries", "live"} <= set(row["calls"][0])
    assert rows[2, "bp"]["table_1"] == pytest.approx(1) and rows[2, "fr"]["table_1"] > 1
    # Stashing keeps weights besides, and 1F1B no more micro-batches than stages; all is added up over the devices.
    assert rows[2, "fr-stashed"]["peak"]["history"] > rows[2, "fr"]["peak"]["history"]
    assert rows[2, "1f1b"]["microbatches"] == rows[2, "gpipe"]["microbatches"] == 4
    assert rows[2, "1f1b"]["activations"] < rows[2, "gpipe"]["activations"]
    printed = capsys.readouterr().out
    assert "table 1" in printed and all(f" {name} " in printed for name in CONTESTANTS)

    assert memory.main(arguments) == 2
    assert f"{output} has memory.json, memory.png already. Add --overwrite" in capsys.readouterr().err
    (output / "memory.png").unlink()
    monkeypatch.setattr(memory, "measure", lambda settings: result)
    assert memory.main([*arguments, "--overwrite"]) == 0
    assert (output / "memory.png").exists()


def test_numbers_of_microbatches(capsys):
    assert memory.main([*SMALL, "--methods", "fr", "1f1b", "recompute", "--microbatches", "2", "fr=1", "fr=4"]) == 0
    rows = [line.split()[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("mlp ")]
    each = [["fr", "1"], ["fr", "4"], ["1f1b", "2"], ["recompute", "1"]]
    assert rows == [[method, K, M] for K in ("1", "2") for method, M in each]


def test_without_output_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert memory.main(["--models", "mlp", "--K", "1", "--batch-size", "4", "--methods", "bp"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet2"], "--models resnet2 is unknown; it can be mlp, resnet8"),
        (["--methods", "fr", "fr"], "--methods fr fr: give one or more distinct values"),
        (["--K", "2", "1"], "--K 2 1: give one or more increasing values, each at least 1"),
        (["--K", "0"], "--K 0 is out of range; each must be at least 1"),
        (["--models", "mlp", "--K", "7"], "--K 7: mlp has 6 layers, so K can be 1 to 6"),
        (
            ["--batch-size", "6", "--methods", "gpipe"],
            "--batch-size 6 cannot be split into the 4 equal parts of gpipe",
        ),
        (
            ["--batch-size", "6", "--methods", "1f1b", "--microbatches", "4"],
            "--batch-size 6 cannot be split into the 4 equal parts of 1f1b",
        ),
        (["--methods", "recompute", "--microbatches", "4"], "none of recompute has micro-batches. Drop the flag"),
    ],
)
def test_bad_settings_end_with_2(arguments, message, capsys):
    assert memory.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_fewer_devices_than_stages(monkeypatch, capsys):
    """They would share a device, and pass for K; methods of one device need one only."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    assert memory.main([*SMALL, "--K", "3", "--methods", "fr", "recompute"]) == 2
    said = capsys.readouterr().err
    assert "--K 3 stages need a device each, and JAX sees 1 (cpu). Use at most --K 1, leave fr out of --methods" in said
    assert memory.main([*SMALL, "--methods", "recompute", "--K", "2"]) == 0


def test_output_that_is_a_file_ends_with_2(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    assert memory.main([*SMALL, "--output", str(path)]) == 2
    assert f"--output {path} cannot be a folder" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.parametrize("K", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_what_recomputes_is_back_propagation(K):
    layers = fr.models.mlp(num_classes=2, depth=3, width=5, dropout_rate=0.3)
    # No chains: a wrapped one is none either, and draws other weights and masks than a chain.
    stages = [fr.Stage(*stage[:2]) for stage in fr.partition(layers, range(1, K))]
    common = {"placement": fr.placement(K, jax.devices()[:1]), "donate": True}
    loss_fn = lambda y, z: jnp.mean((y - z) ** 2)
    optimizer = optax.sgd(0.1, momentum=0.9)
    plain = fr.backprop(stages, loss_fn, optimizer, **common)
    others = [
        recomputing(stages, loss_fn, optimizer, **common),
        fr.backprop([checkpointed(stage) for stage in stages], loss_fn, optimizer, **common),
    ]
    rng = np.random.default_rng(0)
    batches = [fr.Batch(*(rng.uniform(-1, 1, (6, n)).astype(np.float32) for n in (4, 2))) for _ in range(4)]
    expected, losses = plain.init(jax.random.key(0), batches[0]), []
    for batch in batches:
        expected, info = plain.step(expected, batch)
        losses.append(info.loss)
    for algorithm in others:
        state = algorithm.init(jax.random.key(0), batches[0])
        for batch, loss in zip(batches, losses, strict=True):
            state, info = algorithm.step(state, batch)
            np.testing.assert_allclose(info.loss, loss, rtol=1e-5)
        chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-6)


def test_figure():
    peak = dict.fromkeys(KINDS, 10**6)
    rows = [
        {"model": model, "K": K, "method": method, "microbatches": 1, "peak": peak, "ratio": 1.25}
        for model in ("a", "b") for K in (1, 2) for method in ("bp", "fr")
    ]  # fmt: skip
    settings = {"models": ["a", "b"], "methods": ["bp", "fr"], "batch_size": 4}
    made = {"optimizer": "SGD", "backend": "cpu", "jax": "0", "date": "today"}
    panels = figure({"settings": settings, "rows": rows, **made}).get_axes()
    assert [panel.get_title() for panel in panels] == ["a", "b"]
    heights = np.array([bar.get_height() for bar in panels[0].patches])
    assert len(heights) == 2 * 2 * 3 and heights.sum() == pytest.approx(4 * len(KINDS))
