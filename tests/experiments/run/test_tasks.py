"""A task of another kind, next-token prediction, needs no change in the programs, the reports and the pictures."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fr_jax.data.pipelines import InputPipeline
from fr_jax.experiments._cli.command_line import Program
from fr_jax.experiments._cli.settings import Resolved, TrainSettings
from fr_jax.experiments._run import program, tasks
from fr_jax.experiments.compare.__main__ import main as compare
from fr_jax.experiments.curves.__main__ import main as curves
from fr_jax.plotting.comparison import Line, comparison_figure
from fr_jax.plotting.curves import figure
from fr_jax.training.evaluation import sum_over
from fr_jax.training.metrics_log import read_rows
from fr_jax.training.task import Headline, Task
from fr_jax.types import Batch, Stage

VOCABULARY, CONTEXT = 8, 6


class Text:
    """A sequence of tokens in which each follows from the one before."""

    name, source = "abc", "made up: the alphabet, again and again"
    tokens = np.arange(200) % VOCABULARY


def windows(starts: np.ndarray) -> Batch:
    positions = starts[:, None] + np.arange(CONTEXT)
    return Batch(jnp.asarray(Text.tokens[positions]), jnp.asarray(Text.tokens[positions + 1]), jnp.asarray(starts))


def nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@jax.jit
def sums(logits, targets, valid):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(-1)
    return {"loss": jnp.where(jnp.arange(len(targets)) < valid, losses, 0).sum()}


def make_task(settings: Resolved, text: Text, sharding: object) -> Task:
    examples, batch_size = 24, settings.batch_size
    train_batch = lambda step: windows((step * batch_size + np.arange(batch_size)) % examples)
    pipeline = InputPipeline(examples // batch_size, train_batch, lambda: iter([(windows(np.arange(50, 58)), 7)]))

    def evaluate(predict, state):
        total = sum_over(sums, predict, state, pipeline.test_batches())
        loss = total["loss"] / total["examples"]
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    return Task(
        text.name,
        text.source,
        pipeline,
        loss=nats,
        metrics=lambda logits, targets: {"bits_per_byte": nats(logits, targets) / math.log(2)},
        evaluate=evaluate,
        headline=Headline("bits_per_byte"),
        unit="tokens",
        units_per_step=batch_size * CONTEXT,
        examples=examples,
    )


def bigrams(settings: Resolved, text: Text) -> list[Stage]:
    """An embedding and a projection: enough to learn what follows a token."""

    def embed(key, x):
        return 0.1 * jax.random.normal(key, (VOCABULARY, 4)), ()

    def project(key, x):
        return 0.1 * jax.random.normal(key, (4, VOCABULARY)), ()

    return [
        Stage(embed, lambda params, state, x, *, key=None, train=True: (params[x], state)),
        Stage(project, lambda params, state, x, *, key=None, train=True: (x @ params, state)),
    ]


KIND = tasks.Kind("abc", lambda settings, **options: Text(), lambda s, text: 24, bigrams, make_task)


@pytest.fixture
def language(monkeypatch):
    """The name of an image model stands for a language model: --model takes known names only."""
    monkeypatch.setitem(tasks.KINDS, "resnet8", KIND)


def test_a_language_model_through_the_program(language, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = TrainSettings(
        K=2, model="resnet8", batch_size=8, steps=30, learning_rate=1.0, log_every=2, eval_every=10, workdir=folder
    )
    this = Program("lm", "abc", TrainSettings())
    assert program.run(this, settings) == 0
    rows = read_rows(folder / "metrics.jsonl")
    train, test = ([row for row in rows if f"{kind}_loss" in row] for kind in ("train", "test"))
    common = {"step", "epoch", "seconds", "dataset"}
    norms = {"gradient_norm/1", "gradient_norm/2"}
    assert set(train[-1]) == common | norms | {"train_loss", "train_bits_per_byte", "tokens_per_s"}
    assert set(test[-1]) == common | {"test_loss", "test_bits_per_byte"} and len(test) == 3
    summary = json.loads((folder / "summary.json").read_text())
    bits = [row["test_bits_per_byte"] for row in test]
    assert summary["test_bits_per_byte"] == bits[-1] < 2.5 < math.log2(VOCABULARY)
    assert summary["best_test_bits_per_byte"] == min(bits) and "test_accuracy" not in summary
    assert summary["test_loss"] == pytest.approx(bits[-1] * math.log(2)) and summary["dataset"] == "abc"
    out = capsys.readouterr().out
    assert f"Done: test bits per byte {bits[-1]:.4f} (best {min(bits):.4f}) on abc after 30 steps" in out
    assert f"test loss {test[0]['test_loss']:.4f}  test bits per byte {bits[0]:.4f}" in out and "tokens/s" in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert curves(["--runs", str(folder), "--output", str(tmp_path / "x.png")]) == 0
    headline = Headline.of(json.loads((folder / "config.json").read_text()))
    panels = figure({"run": rows}, title="", data_source="", headline=headline).axes
    assert [panel.get_ylabel() for panel in panels] == ["loss", "", "bits per byte", ""]
    np.testing.assert_allclose(panels[2].lines[-1].get_ydata(), bits)
    panels = comparison_figure([Line("run", [rows], 0, 0)], title="", data_source="", headline=headline).axes
    assert panels[2].get_ylabel() == "test bits per byte"
    np.testing.assert_allclose(panels[2].lines[-1].get_ydata(), bits)


def test_language_models_compared(language, tmp_path):
    words = ["--model", "resnet8", "--methods", "bp", "fr", "--K", "2", "--batch-size", "8", "--steps", "4"]
    assert compare([*words, "--workdir", str(tmp_path)]) == 0
    lines = json.loads((tmp_path / "comparison.json").read_text())["lines"]
    summary = json.loads((tmp_path / "fr-K2-seed0" / "summary.json").read_text())
    assert lines[1]["test_bits_per_byte"] == [round(summary["test_bits_per_byte"], 4)]
    assert lines[1]["best_test_bits_per_byte"] == [round(summary["best_test_bits_per_byte"], 4)]
    table = (tmp_path / "table.md").read_text()
    assert "| test bits per byte | best " in table and "The bits per byte are those on the test set" in table
    assert f"{summary['test_bits_per_byte']:.4f}" in table and "rror" not in table
