"""The program trains as cifar does, bit for bit, measures what it says, and goes on where it was."""

import json

import numpy as np
import pytest

from fr_jax.experiments._run import program
from fr_jax.experiments.cifar import main as cifar
from fr_jax.experiments.sufficient_direction import __main__ as sufficient_direction
from fr_jax.experiments.sufficient_direction.picture import direction_figure, standing_out
from fr_jax.training.metrics_log import read_rows

SMALL = [
    *("--dataset", "synthetic", "--model", "mlp", "--depth", "3", "--width", "8"),
    *("--K", "3", "--batch-size", "16", "--learning-rate", "0.02", "--milestones", "0.1", "--log-every", "2"),
]
MEASURED = ["--every", "3", "--gradient-batches", "6"]


def rows_of(folder, name="sufficient_direction.jsonl"):
    return read_rows(folder / name)


def losses(folder):
    return [row["train_loss"] for row in rows_of(folder, "metrics.jsonl") if "train_loss" in row]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    words = [*SMALL, *MEASURED, "--steps", "10", "--workdir", str(folder)]
    assert sufficient_direction.main(words) == 0
    return folder


def test_training_is_not_disturbed(whole_run, tmp_path):
    words = [*SMALL, "--steps", "10", "--workdir", str(tmp_path / "plain")]
    assert cifar(words) == 0
    assert losses(whole_run) == losses(tmp_path / "plain")


def test_rows_and_picture(whole_run):
    rows = rows_of(whole_run)
    assert [row["step"] for row in rows] == [0, 3, 6, 9]
    assert rows[0]["sigma"][:2] == [0, 0]  # stages 1 and 2 have nothing to replay yet
    for row in rows:
        assert len(row["sigma"]) == 3 and all(np.isfinite(row["one_batch"]["sigma"]))
        assert row["network"]["gradient_norm"] == pytest.approx(np.hypot.reduce(row["gradient_norm"]))
        # the last stage is never late: its direction is the mini-batch's own gradient
        assert row["sigma"][2] == pytest.approx(row["one_batch"]["sigma"][2], rel=1e-4)
        sigma, cosine, ratio = (row["network"][name] for name in ("sigma", "cosine", "norm_ratio"))
        assert sigma == pytest.approx(cosine * ratio)
    assert (whole_run / "sufficient_direction.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole_run / "config.json").read_text())["gradient_batches"] == 6


def test_the_gradient_is_of_examples_drawn_apart(monkeypatch, tmp_path):
    """The mini-batch that a step is made with is in no sample, and no sample has an example twice."""
    asked, epochs = [], []
    build = program.build

    def noting(*args, **options):
        session = build(*args, **options)
        pipeline = session.task.pipeline
        epochs.append(pipeline.steps_per_epoch)
        noted = pipeline._replace(train_batch=lambda step: asked.append(step) or pipeline.train_batch(step))
        return session._replace(task=session.task._replace(pipeline=noted))

    monkeypatch.setattr(program, "build", noting)
    words = [*SMALL, "--batch-size", "128", "--every", "3", "--gradient-batches", "1000"]
    assert sufficient_direction.main([*words, "--steps", "4", "--workdir", str(tmp_path / "run")]) == 0
    (epoch,) = epochs
    trained = {step for step in asked if step < 100}
    assert trained >= {0, 1, 2, 3}
    samples = [step for step in asked if step not in trained]
    assert len(samples) == 2 * epoch and samples[:epoch] == samples[epoch:]
    assert samples[:epoch] == list(range(samples[0], samples[0] + epoch)) and samples[0] % epoch == 0


def test_a_resumed_run_has_the_same_rows(whole_run, tmp_path):
    words = [*SMALL, *MEASURED, "--workdir", str(tmp_path / "run")]
    assert sufficient_direction.main([*words, "--steps", "6"]) == 0
    assert sufficient_direction.main([*words, "--steps", "10", "--resume"]) == 0
    assert rows_of(tmp_path / "run") == rows_of(whole_run)


@pytest.mark.slow  # quick: what a folder does with --overwrite (training/test_run_folder)
def test_overwriting_starts_anew(tmp_path):
    words = [*SMALL, *MEASURED, "--steps", "3", "--workdir", str(tmp_path / "run")]
    assert sufficient_direction.main(words) == 0
    assert sufficient_direction.main(words) == 2  # a finished run is not overwritten
    assert sufficient_direction.main([*words, "--overwrite"]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--every", "0"], "--every 0"),
        (["--gradient-batches", "-1"], "--gradient-batches -1 is out of range; it must be at least 0"),
        (["--distributed"], "one process"),
        (["--method", "eqprop"], "--method eqprop has no stages whose directions back-propagation's gradient could be"),
    ],
)
def test_refusals(words, said, capsys, tmp_path):
    assert sufficient_direction.main([*SMALL, *words, "--workdir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_lost_in_noise_is_left_out_of_the_picture_and_the_summary():
    one = lambda x, square: {"sigma": x, "cosine": x, "norm_ratio": x, "gradient_square": square, "square_noise": 1.0}
    clear, lost = one(0.5, 4.0), one(90.0, 1.9)
    rows = []
    for step in range(20):
        stages = {name: [clear[name], (lost if step > 9 else clear)[name]] for name in clear}
        rows.append({"step": step, "epoch": step / 10, **stages, "one_batch": {"network": clear}})
    drawing = direction_figure(rows, title="title", note="note")
    dots = [line.get_ydata() for line in drawing.axes[0].get_lines() if line.get_marker() == "."]
    assert [np.isfinite(values).sum() for values in dots] == [20, 10, 20]
    line = next(line for line in drawing.axes[0].get_lines() if line.get_label() == "stage 2").get_ydata()
    assert np.isfinite(line[:10]).all() and np.isnan(line[10:]).all()
    assert "left out: 25 %" in drawing.texts[0].get_text() + drawing.texts[1].get_text()
    said = sufficient_direction.summary(rows)
    assert "stage 1  0.500 (0.500, 100 %) in 20" in said and "stage 2  0.500 (0.500, 100 %) in 10" in said
    for row in rows:
        row["gradient_square"] = [4.0, 0.0]
    assert "stage 2  never moved, or never stood out" in sufficient_direction.summary(rows)


def test_what_lies_beyond_an_axis_is_marked_at_its_edge():
    one = lambda x: {"sigma": x, "cosine": x, "norm_ratio": x, "gradient_square": 4.0, "square_noise": 1.0}
    rows = [{"epoch": t / 9, **{name: [v] for name, v in one(0.5).items()}} for t in range(200)]
    rows = [{**row, "one_batch": {"network": one(0.5)}} for row in rows]
    rows[70] |= {"sigma": [-50.0]}
    rows[80] |= {"sigma": [60.0]}
    sigma = direction_figure(rows, title="title", note="note").axes[0]
    low, high = sigma.get_ylim()
    assert -50 < low < 0.5 < high < 60
    marks = {line.get_marker(): line.get_xydata() for line in sigma.get_lines() if line.get_marker() in ("^", "v")}
    assert marks["v"].tolist() == [[70 / 9, low]] and marks["^"].tolist() == [[80 / 9, high]]


def test_the_figure_has_a_line_per_stage(whole_run):
    drawing = direction_figure(rows_of(whole_run), title="title", note="note", milestones=(0.01, 99.0))
    labels = [handle.get_label() for handle in drawing.axes[0].get_lines() if not handle.get_label().startswith("_")]
    assert labels == ["stage 1", "stage 2", "stage 3", "one mini-batch's own gradient, whole network"]
    (note,) = (text.get_text() for text in drawing.texts if text.get_text().endswith("note"))
    left_out = np.isnan(standing_out(rows_of(whole_run), "norm_ratio"))
    assert ("left out" in note) == left_out.any() and "dotted: the learning rate falls" in note
    with pytest.raises(ValueError, match="at least one row"):
        direction_figure([], title="", note="")
