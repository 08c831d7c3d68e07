"""The MNIST program, and what holds for every method in every program."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
import requests

import fr_jax as fr
from fr_jax.data import image_sets as data
from fr_jax.data.pipelines import input_pipeline
from fr_jax.experiments import mnist
from fr_jax.experiments._cli.checks import check, resolve
from fr_jax.experiments._cli.command_line import parse
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._run.tasks import kind_of
from fr_jax.training.metrics_log import read_rows

QUICK = ["--dataset=digits", "--depth=2", "--width=8", "--steps=12", "--checkpoint-every=5", "--eval-every=12"]
QUICK += ["--batch-size=16", "--test-examples=32"]
# The settings of its own that change what a method's state holds; other methods run with their defaults.
OWN = {
    "bp": ["--accumulate", "2"],
    "fr": ["--weight-prediction", "1", "--accumulate", "2"],
    "ddg": ["--gradient-shrinking", "0.5"],
    "dni": ["--label-conditioning"],
    "blockprop": ["--cache", "--h-every", "2"],
    "gpipe": ["--microbatches", "2"],
    "2bw": ["--microbatches", "2"],
    "mac": ["--cache", "--penalty-patience", "3"],
}


def quick(method: str) -> list[str]:
    """The flags that make a run by a method small."""
    card = METHODS[method]
    words = [word for word in QUICK if not (card.full_batch and word.startswith("--batch-size"))]
    return ["--method", method, "--K", "1" if card.whole else "2", *words, *OWN.get(method, [])]


@pytest.fixture
def program(in_process, no_pictures):
    """Runs the program in this process -> exit code, stdout, stderr; an empty picture."""
    return functools.partial(in_process, mnist.main)


def test_defaults():
    settings = parse("mnist", mnist.MNIST.defaults, [])
    check(settings)
    resolved = resolve(settings, "mnist", 60_000)
    assert (resolved.model, resolved.K, resolved.depth, resolved.width) == ("mlp", 3, 6, 256)
    assert (resolved.steps, resolved.learning_rate) == (5 * 468, 0.01)


def test_the_network_of_blockprops_figure_2():
    settings = parse("mnist", mnist.MNIST.defaults, ["--preset", "blockprop", "--h-steps", "2", "--penalty", "0.1"])
    check(settings)
    assert (settings.method, settings.K, settings.depth, settings.dataset) == ("blockprop", 2, 2, "mnist")
    assert (settings.h_steps, settings.penalty) == (2, 0.1)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("bp", "gpipe", "ddg", "blockprop", "2bw") else ())
        for name in METHODS
    ],
)
def test_a_resumed_run_is_bit_identical(program, tmp_path, method, checksums):
    """From the checkpoint of step 10 on; stages on devices of their own."""
    out = train_and_resume(program, checksums, tmp_path, *quick(method))
    assert f"mlp, {METHODS[method].title}, K = {quick(method)[3]}" in out


# What else a state can hold between steps, with four micro-batches for each of four stages.
IN_FLIGHT = [
    ["bp"],
    ["fr", "--weight-prediction", "1", "--prediction-momentum", "0.9", "--spike-compensation"],
    ["fr", "--rescheduling", "20", "--discrepancy-decay", "0.3"],
    ["fr", "--replay-weights", "stashed", "--optimizer", "nadam"],
    ["ddg", "--rescheduling", "20", "--accumulate", "2"],
    ["gpipe", "--pipeline-schedule", "1f1b"],
    ["2bw"],
]


@pytest.mark.slow
@pytest.mark.parametrize("own", IN_FLIGHT, ids=" ".join)
def test_a_resumed_run_with_micro_batches_is_bit_identical(program, tmp_path, own, checksums):
    split = ["--K", "4", "--depth", "4", "--microbatches", "4"]
    out = train_and_resume(program, checksums, tmp_path, *QUICK, "--method", *own, *split)
    title = "1F1B" if "1f1b" in own else METHODS[own[0]].title + ", stashed weights" * ("stashed" in own)
    assert f"mlp, {title}, K = 4, M = 4; batch 16" in out


def train_and_resume(program, checksums, folder: pathlib.Path, *arguments: str) -> str:
    """Trains, and again from the checkpoint of step 10; what the first run said."""
    code, said, err = program(*arguments, "--workdir", folder / "whole")
    assert code == 0, err
    shutil.copytree(folder / "whole", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / "12")
    (folder / "again" / "summary.json").unlink()
    code, out, err = program(*arguments, "--workdir", folder / "again", "--resume")
    assert code == 0 and "Resuming after step 10" in out, err
    assert checksums(folder / "again") == checksums(folder / "whole")
    losses = [
        [row.get("train_loss") for row in read_rows(folder / run / "metrics.jsonl")] for run in ("whole", "again")
    ]
    assert losses[0] == losses[1]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, card in METHODS.items() if not card.full_batch])
def test_one_device_and_data_parallelism(program, tmp_path, method):
    losses = {}
    for name, flags in {"one": ["--devices", 1], "two each": ["--data-parallel", 2]}.items():
        folder = tmp_path / name
        code, _, err = program(*quick(method), *flags, "--workdir", folder)
        assert code == 0, err
        losses[name] = [row["train_loss"] for row in read_rows(folder / "metrics.jsonl") if "train_loss" in row]
    np.testing.assert_allclose(losses["one"], losses["two each"], rtol=2e-3)


def test_all_examples_must_be_shared_equally():
    words = ["--method", "admm", "--K", "1", "--data-parallel", "2"]
    settings = parse("mnist", mnist.MNIST.defaults, words)
    assert resolve(settings, "mnist", 60_000).batch_size == 60_000
    with pytest.raises(SettingsError, match=r"does not divide the 1,433 .* Use --data-parallel 1"):
        resolve(settings, "digits", 1433)


@pytest.mark.parametrize(("method", "alike"), [("admm", True), ("fr", False)])
def test_what_keeps_every_example_sees_it_as_it_is(method, alike):
    """Digits are cropped at random, and ADMM's z and a of an example would belong to another crop."""
    kind, words = kind_of("mlp"), ["--dataset", "digits", "--method", method, "--K", "1"]
    settings = parse("mnist", mnist.MNIST.defaults, words)
    dataset = kind.load(settings, preferred="mnist")
    resolved = resolve(settings, "digits", len(dataset.train_labels))
    batches = kind.task(resolved, dataset, fr.placement(1)[0]).pipeline
    whole = input_pipeline(dataset, resolved.batch_size, seed=resolved.seed, augment=False)
    assert np.array_equal(batches.train_batch(0).inputs, whole.train_batch(0).inputs) == alike


@pytest.mark.parametrize("method", ["ddg", "blockprop"])
def test_divergence_is_a_result(program, tmp_path, method):
    flags = ["--learning-rate", "1e20", "--workdir", tmp_path]
    code, _, err = program("--method", method, "--K", 2, *QUICK, *flags)
    assert code == 3 and "the run diverged" in err and "Traceback" not in err
    assert json.loads((tmp_path / "summary.json").read_text())["diverged"] is True


def test_images_of_mnist(program, tmp_path, monkeypatch):
    """28 x 28 x 1, neither cropped nor flipped, from a folder."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (n, 28, 28, 1), np.uint8) for n in (200, 50)]
    labels = [np.arange(n, dtype=np.int32) % 10 for n in (200, 50)]
    arrays = (images[0], labels[0], images[1], labels[1])
    tiny = data.Dataset("mnist", *arrays, 10, np.full(1, 0.5), np.ones(1), False, "a tiny MNIST", crop=False)
    asked = []

    def load(name, data_dir, *, preferred):
        asked.append((name, data_dir, preferred))
        return tiny

    monkeypatch.setattr(data, "load", load)
    flags = ["--K", 2, "--depth", 2, "--width", 8, "--steps", 2, "--batch-size", 16, "--workdir", tmp_path / "run"]
    code, _, err = program(*flags, "--data-dir", "somewhere")
    assert code == 0, err
    assert asked == [("auto", pathlib.Path("somewhere"), "mnist")]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dataset"] == "mnist"


def test_auto_without_a_network_says_so_and_trains_on_digits(program, tmp_path, monkeypatch):
    for name in ("FR_JAX_CACHE", "TFDS_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def no_network(*args: object, **kwargs: object) -> None:
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests, "head", no_network)
    quick = [word for word in QUICK if word != "--dataset=digits"]
    code, out, _ = program("--K", 1, *quick, "--workdir", tmp_path / "run")
    assert code == 0 and "!!! NO MNIST" in out and "digits" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dataset"] == "digits"
