"""The figures of the BlockProp paper, ``fr_jax.experiments.blockprop``."""

import json
import shutil
from pathlib import Path

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
from fr_jax.experiments._run import program as training
from fr_jax.experiments._run.many_runs import train_all
from fr_jax.experiments.blockprop import __main__ as blockprop
from fr_jax.experiments.blockprop.picture import figure
from fr_jax.experiments.blockprop.plan import first_block_factor, lines_of, settings_of_run
from fr_jax.experiments.blockprop.result import summarise, table
from fr_jax.experiments.blockprop.settings import BlockPropSettings, resolve
from fr_jax.training.classification import cross_entropy
from fr_jax.training.metrics_log import read_rows

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
FIGURE_2 = [*QUICK, *["--width", "8", "--seeds", "0", "--h-steps", "4", "--penalties", "1", "--scales"]]
FIGURE_3 = ["--figure", "3", *QUICK, "--model", "mlp"]
SMALL = {"model": "mlp", "depth": 2, "width": 8, "batch_size": 16, "log_every": 5, "devices": 1, "balance": "uniform"}
BLOCKPROP = {"method": "blockprop", "K": 2, "penalty": 2.0, "h_steps": 1, "h_learning_rate": 0.1}


@pytest.fixture
def program(capsys):
    """Runs the program in this process -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return blockprop.main([str(argument) for argument in arguments]), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def digits():
    dataset = data.load("digits")
    return dataset._replace(test_images=dataset.test_images[:8], test_labels=dataset.test_labels[:8])


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Trains a small network of two blocks -> step -> its training row."""
    home = tmp_path_factory.mktemp("trained")

    def train(steps: int = 20, folder: Path = home, **own: object) -> dict[int, dict]:
        own = {"stage_learning_rates": (0.1, 0.05), **BLOCKPROP, **own}
        run = TrainSettings(**SMALL, steps=steps, milestones=(), weight_decay=0.0, **own)
        assert train_all({"run": run}, folder, digits, caller="blockprop", again="again") == 0
        return {row["step"]: row for row in read_rows(folder / "run" / "metrics.jsonl") if "train_loss" in row}

    return train


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


@pytest.fixture(scope="module")
def figure_2(tmp_path_factory):
    """Figure 2 with four runs of six steps."""
    home = tmp_path_factory.mktemp("figure-2")
    assert blockprop.main([*FIGURE_2, "--workdir", str(home)]) == 0
    return home


def test_figure_2(figure_2):
    result = json.loads((figure_2 / "figure-2.json").read_text())
    panels = ["baseline", "frozen", "h_steps", "penalty, N_h = 4", "penalty, N_h = 2"]
    assert [line["panel"] for line in result["lines"]] == panels
    assert [line["factor"] for line in result["lines"]] == pytest.approx([1, 0, 0.0776318, 0.0776318, 0.0396], 1e-5)
    assert result["lines"][2]["test_accuracy"] == result["lines"][3]["test_accuracy"]  # one run, two panels
    assert result["lines"][0]["curves"]["test_accuracy"]["step"] == [3, 6]
    assert [line["gluing_loss"] is None for line in result["lines"]] == [True, False, False, False, False]
    assert (figure_2 / "figure-2.png").read_bytes().startswith(b"\x89PNG")
    rows = (figure_2 / "table.md").read_text().splitlines()
    assert rows[0].startswith("| line") and sum(row.startswith("| BlockProp") for row in rows) == 3


def test_figure_2_is_trained_once(figure_2, program, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "run", lambda *args, **kwargs: pytest.fail("a finished run was repeated"))
    code, out, _ = program(*FIGURE_2, "--workdir", figure_2)
    assert (code, out.count("is finished already")) == (0, 4)
    code, _, err = program(*FIGURE_2, "--workdir", figure_2, "--momentum", "0.5")
    assert code == 2 and "holds a run with other settings: --momentum is 0.5 and was 0.0" in err
    code, _, err = program(*FIGURE_2, "--workdir", figure_2, "--test-examples", "10")
    assert code == 2 and "--test-examples is 10 and was 364" in err
    code, _, err = program(*("5" if word == "6" else word for word in FIGURE_2), "--workdir", figure_2)
    assert code == 2 and "holds a run of 6 steps, more than the 5 asked for" in err
    copy = shutil.copytree(figure_2, tmp_path / "copy")
    again: list[str] = []
    monkeypatch.setattr(training, "run", lambda this, settings, **kwargs: again.append(settings.workdir.name) or 0)
    code, out, _ = program(*FIGURE_2, "--workdir", copy, "--momentum", "0.5", "--overwrite")
    assert code == 0 and len(again) == 4 and not list(copy.glob("*/summary.json"))


def test_runs_of_the_first_version_are_known(figure_2, program, tmp_path, monkeypatch):
    """Their config.json had a step size for each block, also where these were equal."""
    copy = shutil.copytree(figure_2, tmp_path / "copy")
    for path in copy.glob("*/config.json"):
        config = json.loads(path.read_text())
        del config["stage_learning_rates"]
        path.write_text(json.dumps(config | {"block_learning_rates": [0.1, 0.1]}))
    monkeypatch.setattr(training, "run", lambda *args, **kwargs: pytest.fail("a finished run was repeated"))
    assert program(*FIGURE_2, "--workdir", copy)[0] == 0


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


def test_each_block_has_its_step_size_and_rows_the_mean_gluing_loss(trained, digits):
    stages = fr.partition(fr.models.mlp(num_classes=10, depth=2, width=8), (1,))
    each = [optax.sgd(rate, momentum=0.9) for rate in (0.1, 0.05)]
    method = fr.blockprop(stages, cross_entropy, each, penalty=2.0, h_steps=1, h_learning_rate=0.1)
    pipeline = input_pipeline(digits, 16, seed=0)
    state, losses = method.init(jax.random.key(0), pipeline.train_batch(0)), []
    for step in range(20):
        state, info = method.step(state, pipeline.train_batch(step))
        losses.append((float(info.loss), float(info.metrics["gluing_loss/1"])))
    rows = trained()
    assert list(rows) == [5, 10, 15, 20]
    found = [(row["train_loss"], row["gluing_loss/1"]) for row in rows.values()]
    np.testing.assert_allclose(found, np.reshape(losses, (4, 5, 2)).mean(1), rtol=1e-4)


def test_a_penalty_is_a_step_size_of_block_1(trained, tmp_path):
    whole = trained()
    for step, row in trained(folder=tmp_path, penalty=1.0, stage_learning_rates=(0.2, 0.05)).items():
        assert row["train_loss"] == pytest.approx(whole[step]["train_loss"], rel=1e-4)
        assert row["gluing_loss/1"] == pytest.approx(whole[step]["gluing_loss/1"], rel=1e-3)


def test_a_run_that_goes_on_comes_to_the_same_rows(trained, tmp_path):
    whole = trained()
    assert list(trained(10, folder=tmp_path)) == [5, 10]
    rows = trained(folder=tmp_path)
    for step in (15, 20):
        names = ("train_loss", "train_accuracy", "gluing_loss/1")
        assert all(rows[step][name] == whole[step][name] for name in names)


def test_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv(NUM_PROCESSES, "2")
    with pytest.raises(SettingsError, match="blockprop trains one run after another in one process"):
        blockprop.run(BlockPropSettings(workdir=tmp_path))


def runs_of(settings: BlockPropSettings) -> dict[str, TrainSettings]:
    """By name, as the program makes them."""
    s = resolve(settings)
    return {line.run_name(seed): settings_of_run(line, seed, s) for line in lines_of(s) for seed in s.seeds}


def test_defaults_are_the_figures():
    two, three = resolve(BlockPropSettings()), resolve(BlockPropSettings(figure=3, preset="paper", epochs=7))
    assert (two.model, two.h_steps, two.batch_size, two.momentum) == ("mlp", (1, 2, 4, 8, 16), 128, 0.0)
    assert (three.model, three.batch_size, three.epochs, three.h_learning_rate) == ("resnet18", 128, 7, 0.01)
    assert (two.milestones, three.milestones) == ((), (50.0, 75.0))
    assert resolve(BlockPropSettings(steps=5)).epochs is None
    runs = runs_of(two)
    assert len(list(lines_of(two))) == 26 and len(runs) == 3 * 24  # lambda_1 = 1 at N_h = 2 and 4 is in two panels
    assert "blockprop-penalty10-steps4-rates0.1-0.1-seed2" in runs
    assert runs["bp-rates0.001-0.1-seed0"].stage_learning_rates == pytest.approx((0.001, 0.1))
    assert {(run.model, run.depth, run.width) for run in runs.values()} == {("mlp", 2, 256)}
    assert {run.seed for run in runs_of(BlockPropSettings(seeds=(3, 5))).values()} == {3, 5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": ((1.0, 1.0, 1.0),)}, "--choices belongs to figure 3, not to --figure 2"),
        ({"model": "resnet8"}, "--model belongs to figure 3, not to --figure 2"),
        ({"figure": 3, "h_steps": (1,)}, "--h-steps belongs to figure 2, not to --figure 3"),
        ({"penalties": (0.0,)}, "--penalties 0.0 is out of range; each must be above 0"),
        ({"h_steps": (0, 1)}, "--h-steps 0 1 is out of range; each must be at least 1"),
        ({"figure": 3, "choices": ((1.0, -1.0, 1.0),)}, "--choices 1.0 -1.0 1.0 is out of range; each must be above 0"),
        ({"seeds": (0, 0)}, "--seeds 0 0: give one or more distinct values, each at least 0"),
        ({"steps": 5, "epochs": 2}, "--steps and --epochs were both given"),
        ({"test_examples": 0}, "--test-examples 0 is out of range; it must be at least 1"),
        ({"h_learning_rate": -1.0}, "--h-learning-rate -1.0 is out of range; it must be above 0"),
        ({"figure": 3, "model": "resnet9"}, "--model resnet9 is unknown"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SettingsError, match=message.replace(".", "[.]")):
        runs_of(BlockPropSettings(**settings))


@pytest.mark.parametrize("number", [2, 3])
def test_a_figure_of_runs_that_diverged(number, tmp_path):
    settings = resolve(BlockPropSettings(figure=number, seeds=(0,), test_examples=9))
    lines = list(lines_of(settings))
    assert summarise(settings, lines, tmp_path, data.load("digits"))["lines"] == []
    for name in runs_of(settings):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 10, "epoch": 0.1, "train_loss": null, "dataset": "digits"}\n')
        summary = dict.fromkeys(("test_accuracy", "best_test_accuracy", "seconds", "step_seconds_median", "device"))
        (folder / "summary.json").write_text(json.dumps({**summary, "steps": 10, "cuts": [1], "diverged": True}))
    result = summarise(settings, lines, tmp_path, data.load("digits"))
    assert len(result["lines"]) == len(lines) and "(1 of 1 diverged)" in table(result)
    figure(result).savefig(tmp_path / "figure.png")
