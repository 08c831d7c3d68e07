"""The figures of the BlockProp paper, ``fr_jax.experiments.blockprop``."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.data import image_sets as data
from fr_jax.data.pipelines import input_pipeline
from fr_jax.distributed import NUM_PROCESSES
from fr_jax.experiments._cli.settings import TrainSettings
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments.blockprop import __main__ as blockprop
from fr_jax.experiments.blockprop.picture import figure
from fr_jax.experiments.blockprop.result import Line, summarise, table
from fr_jax.experiments.blockprop.runs import Run, first_block_factor, train_run
from fr_jax.experiments.blockprop.settings import BlockPropSettings, resolve
from fr_jax.training.classification import cross_entropy
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.loop import Outcome, Totals
from fr_jax.training.metrics_log import read_rows
from fr_jax.training.run_folder import RunFolder

QUICK = [
    "--dataset",
    "digits",
    "--steps",
    "6",
    "--eval-every",
    "3",
    "--batch-size",
    "16",
    "--compilation-cache",
    "none",
]
FIGURE_2 = [*QUICK, "--width", "8", "--seeds", "0", "--h-steps", "4", "--penalties", "1", "--scales"]
FIGURE_3 = ["--figure", "3", *QUICK, "--model", "mlp"]
SMALL = {"model": "mlp", "depth": 2, "width": 8, "dataset": "digits", "batch_size": 16, "steps": 20, "devices": 1}


@pytest.fixture
def program(capsys):
    """Runs the program in this process -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return blockprop.main([str(argument) for argument in arguments]), *capsys.readouterr()

    return run


def small_run(**own: object) -> Run:
    own = {"method": "blockprop", "K": 2, "penalty": 2.0, "h_steps": 1, "h_learning_rate": 0.1, **own}
    settings = TrainSettings(**SMALL, milestones=(), weight_decay=0.0, balance="uniform", log_every=5, **own)
    return Run(settings, (0.1, 0.05))


def stages():
    relu = lambda x: x * (x > 0)

    def init(key, x):
        return jax.random.normal(key, (x.shape[-1], 5)) / 3, ()

    return [
        fr.Stage(init, lambda w, state, x, **unused: (relu(x @ w), state)),
        fr.Stage(init, lambda w, state, x, **unused: (x @ w, state)),
    ]


@pytest.mark.parametrize(
    ("penalty", "h_steps", "loss_fn"),
    [(3.0, 0, "linear"), (1.0, 4, "linear"), (90.0, 2, "linear"), (110.0, 4, "linear"), (10.0, 1, "cross entropy")],
)
def test_block_1_gets_that_share_of_back_propagations_gradient(x64, penalty, h_steps, loss_fn):
    loss = cross_entropy if loss_fn == "cross entropy" else lambda z, y: jnp.mean(z[:, 0])
    batch = fr.Batch(jax.random.normal(jax.random.key(1), (7, 3)), jnp.arange(7) % 5)
    own = {"penalty": penalty, "h_steps": h_steps, "h_learning_rate": 0.01}
    grads = []
    for make, options in ((fr.backprop, {}), (fr.blockprop, own)):
        method = make(stages(), loss, optax.sgd(0.1), return_grads=True, **options)
        _, info = method.step(method.init(jax.random.key(0), batch), batch)
        grads.append(info.grads[0])
    np.testing.assert_allclose(grads[1], first_block_factor(penalty, 0.01, h_steps) * grads[0], rtol=1e-9, atol=1e-13)


def test_figure_2_is_trained_once(program, tmp_path, monkeypatch):
    code, out, _ = program(*FIGURE_2, "--workdir", tmp_path)
    assert code == 0 and "[4/4]" in out
    result = json.loads((tmp_path / "figure-2.json").read_text())
    panels = ["baseline", "frozen", "h_steps", "penalty, N_h = 4", "penalty, N_h = 2"]
    assert [line["panel"] for line in result["lines"]] == panels
    assert [line["factor"] for line in result["lines"]] == pytest.approx([1, 0, 0.0776318, 0.0776318, 0.0396], 1e-5)
    assert result["lines"][2]["test_accuracy"] == result["lines"][3]["test_accuracy"]  # one run, two panels
    assert result["lines"][0]["curves"]["test_accuracy"]["step"] == [3, 6]
    assert (tmp_path / "figure-2.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[0].startswith("| line") and sum(row.startswith("| BlockProp") for row in rows) == 3

    again: list[str] = []
    monkeypatch.setattr(blockprop, "train_run", lambda run, *rest: again.append(run.name) or outcome())
    code, out, _ = program(*FIGURE_2, "--workdir", tmp_path)
    assert (code, out.count("is finished already"), again) == (0, 4, [])
    code, _, err = program(*FIGURE_2, "--workdir", tmp_path, "--momentum", "0.5")
    assert code == 2 and "holds a run with other settings: --momentum is 0.5 and was 0.0" in err
    code, _, err = program(*FIGURE_2, "--workdir", tmp_path, "--test-examples", "10")
    assert code == 2 and "the number of test images: 10, was" in err
    code, _, err = program(*("5" if word == "6" else word for word in FIGURE_2), "--workdir", tmp_path)
    assert code == 2 and "holds a run of 6 steps, more than the 5 asked for" in err
    code, out, _ = program(*FIGURE_2, "--workdir", tmp_path, "--momentum", "0.5", "--overwrite")
    assert code == 0 and len(again) == 4 and not list(tmp_path.glob("*/summary.json"))


def outcome() -> Outcome:
    return Outcome(None, 6, Totals(), None, None, finished=True)


@pytest.mark.slow
def test_figure_3_a_penalty_is_a_step_size_of_block_1(program, tmp_path):
    choices = ["--choices", "10", "0.05", "0.05", "1", "0.5", "0.05"]
    code, _, _ = program(*FIGURE_3, *choices, "--workdir", tmp_path)
    assert code == 0
    lines = json.loads((tmp_path / "figure-3.json").read_text())["lines"]
    assert [line["panel"] for line in lines] == ["baseline", "choices", "choices"]
    assert [line["factor"] for line in lines] == pytest.approx([1, 0.2, 0.2])
    baseline, large, same = (line["curves"] for line in lines)
    for name in ("gluing_loss", "train_loss", "test_accuracy", "test_loss"):
        np.testing.assert_allclose(large[name]["mean"], same[name]["mean"], rtol=1e-3)
    assert abs(large["test_loss"]["mean"][-1] / baseline["test_loss"]["mean"][-1] - 1) > 1e-2
    assert "gluing_loss" not in baseline


class StopLater:
    """A request to stop that comes after it was looked at ``looks`` times."""

    exit_code = 143

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def signal(self) -> int | None:
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None

    @signal.setter
    def signal(self, number: int) -> None:
        self.looks = 0


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory) -> dict[int, dict]:
    """Step -> row of a run of 20 steps."""
    folder = RunFolder(tmp_path_factory.mktemp("whole"))
    outcome = train_run(small_run(), digits, folder, StopRequest())
    assert outcome.finished and folder.saved_summary()["steps"] == 20
    return training_rows(folder)


def training_rows(folder: RunFolder) -> dict[int, dict]:
    return {row["step"]: row for row in read_rows(folder.metrics) if "train_loss" in row}


def test_rows_have_the_mean_gluing_loss_of_their_steps(whole, digits):
    stages = fr.partition(fr.models.mlp(num_classes=10, depth=2, width=8), (1,))
    each = [optax.sgd(rate, momentum=0.9) for rate in small_run().rates]
    method = fr.blockprop(stages, cross_entropy, each, penalty=2.0, h_steps=1, h_learning_rate=0.1)
    pipeline = input_pipeline(digits, 16, seed=0)
    state, losses = method.init(jax.random.key(0), pipeline.train_batch(0)), []
    for step in range(20):
        state, info = method.step(state, pipeline.train_batch(step))
        losses.append(float(info.metrics["gluing_loss/1"]))
    assert list(whole) == [5, 10, 15, 20]
    found = [row["gluing_loss"] for row in whole.values()]
    np.testing.assert_allclose(found, np.reshape(losses, (4, 5)).mean(1), rtol=1e-4)


def test_a_penalty_is_a_step_size_of_block_1(whole, digits, tmp_path):
    run, folder = small_run(penalty=1.0), RunFolder(tmp_path)
    train_run(run._replace(rates=(2 * run.rates[0], run.rates[1])), digits, folder, StopRequest())
    for step, row in training_rows(folder).items():
        assert row["train_loss"] == pytest.approx(whole[step]["train_loss"], rel=1e-4)
        assert row["gluing_loss"] == pytest.approx(whole[step]["gluing_loss"], rel=1e-3)


def test_a_run_that_was_stopped_goes_on_to_the_same_rows(whole, digits, tmp_path):
    folder = RunFolder(tmp_path)
    outcome = train_run(small_run(), digits, folder, StopLater(12))
    assert not outcome.finished and 0 < outcome.step < 15 and not folder.summary.exists()
    assert train_run(small_run(), digits, folder, StopRequest()).finished
    rows = training_rows(folder)
    for step in (15, 20):
        assert all(rows[step][name] == whole[step][name] for name in ("train_loss", "train_accuracy", "gluing_loss"))


def test_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv(NUM_PROCESSES, "2")
    with pytest.raises(SettingsError, match="blockprop trains one run after another in one process"):
        blockprop.run(BlockPropSettings(workdir=tmp_path))


def test_defaults_are_the_figures():
    two, three = resolve(BlockPropSettings()), resolve(BlockPropSettings(figure=3, preset="paper", epochs=7))
    assert (two.model, two.h_steps, two.batch_size, two.momentum) == ("mlp", (1, 2, 4, 8, 16), 128, 0.0)
    assert (three.model, three.batch_size, three.epochs, three.h_learning_rate) == ("resnet18", 128, 7, 0.01)
    assert (two.milestones, three.milestones) == ((), (50.0, 75.0))
    assert resolve(BlockPropSettings(steps=5)).epochs is None
    names = [run.name for line in blockprop.plan(two) for run in line.runs]
    assert len(names) == 3 * 26 and len(set(names)) == 3 * 24  # lambda_1 = 1 at N_h = 2 and 4 is in two panels
    assert "blockprop-penalty10-steps4-rates0.1-0.1-seed2" in names and "bp-rates0.001-0.1-seed0" in names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": ((1.0, 1.0, 1.0),)}, "--choices belongs to figure 3, not to --figure 2"),
        ({"model": "resnet8"}, "--model belongs to figure 3, not to --figure 2"),
        ({"figure": 3, "h_steps": (1,)}, "--h-steps belongs to figure 2, not to --figure 3"),
        ({"penalties": (0.0,)}, "--penalties 0.0: give one or more different numbers above 0"),
        ({"h_steps": (0, 1)}, "--h-steps 0 1: give one or more different whole numbers, each 1 or more"),
        ({"figure": 3, "choices": ((1.0, -1.0, 1.0),)}, "--choices 1.0 -1.0 1.0: give one or more different numbers"),
        ({"seeds": (0, 0)}, "--seeds 0 0: give one or more different whole numbers, each 0 or more"),
        ({"steps": 5, "epochs": 2}, "--steps and --epochs were both given"),
        ({"test_examples": 0}, "--test-examples 0: give 1 or more"),
        ({"h_learning_rate": -1.0}, "--h-learning-rate -1.0: give a number above 0"),
        ({"figure": 3, "model": "resnet9"}, "--model resnet9 is unknown"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SettingsError, match=message.replace(".", "[.]")):
        blockprop.plan(resolve(BlockPropSettings(**settings)))


@pytest.mark.parametrize("number", [2, 3])
def test_a_figure_of_runs_that_diverged(number, tmp_path):
    settings = resolve(BlockPropSettings(figure=number, seeds=(0,)))
    lines = blockprop.plan(settings)
    assert summarise(settings, lines, tmp_path, data.load("digits"))["lines"] == []
    for run in {run.name: run for line in lines for run in line.runs}.values():
        folder = tmp_path / run.name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 10, "epoch": 0.1, "train_loss": null, "dataset": "digits"}\n')
        summary = dict.fromkeys(("test_accuracy", "best_test_accuracy", "seconds", "step_seconds_median", "device"))
        (folder / "summary.json").write_text(json.dumps({**summary, "steps": 10, "cuts": [1], "diverged": True}))
    result = summarise(settings, lines, tmp_path, data.load("digits"))
    assert len(result["lines"]) == len(lines) and "(1 of 1 diverged)" in table(result)
    figure(result).savefig(tmp_path / "figure.png")


def test_line_of_a_figure_is_one_run_a_seed():
    lines = blockprop.plan(resolve(BlockPropSettings(seeds=(3, 5))))
    assert all(isinstance(line, Line) and [run.settings.seed for run in line.runs] == [3, 5] for line in lines)
