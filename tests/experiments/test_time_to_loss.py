"""The program that compares runs by updates and time, ``fr_jax.experiments.time_to_loss``."""

import json
import math
import pathlib
from typing import Any

import pytest

from fr_jax.diagnostics.simulation.times import times_of_costs
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments.time_to_loss import __main__ as program
from fr_jax.experiments.time_to_loss.lines import (
    Line,
    Recipe,
    Run,
    extra_updates,
    is_beyond,
    lines_of,
    read_runs,
    reference_of,
)
from fr_jax.experiments.time_to_loss.steps import Parts, measure_parts, problem_of, ring_seconds, step_seconds
from fr_jax.experiments.time_to_loss.table import candidates, tables

CONFIG = {
    "model": "gpt", "dataset": "text", "data_source": "a text", "batch_size": 4, "schedule": "cosine",
    "depth": 2, "width": 8, "heads": 2, "context": 8, "optimizer": "adamw", "seed": 0, "learning_rate": 0.01,
    "headline": {"name": "bits_per_byte", "fraction": False},
}  # fmt: skip


def write_run(home: pathlib.Path, name: str, bits: float | None, **settings: Any) -> None:
    """A finished run, as the training programs leave it."""
    folder = home / name
    folder.mkdir(parents=True)
    config = CONFIG | {"method": "bp", "K": 1, "microbatches": 1, "steps": 1000} | settings
    summary = {"steps": config["steps"], "seconds": 1.0, "step_seconds_median": 0.1, "device": "cpu"}
    summary |= {"diverged": bits is None, "test_bits_per_byte": bits}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("runs")
    write_run(home, "bp/500", 2.4, steps=500)
    write_run(home, "bp/1000", 2.2)
    write_run(home, "bp/1000-larger", None, learning_rate=0.1)  # diverged
    delayed = {"method": "fr", "K": 2, "microbatches": 2}
    write_run(home, "fr/0", 2.25, **delayed)
    write_run(home, "fr/1", 2.35, **delayed, seed=1)
    write_run(home, "fr/slow", 2.5, **delayed, learning_rate=0.001)
    write_run(home, "fr/predicted", 2.2, **delayed, weight_prediction=1.0)
    write_run(home, "ddg", 2.1, method="ddg", K=2, microbatches=1)
    return home


def test_extra_updates_on_a_line_in_the_logarithm():
    """score = a - b log(updates), by the reference; a method with score s needs exp((a - s) / b) of its updates."""
    reference = {n: 5 - 0.5 * math.log(n) for n in (500, 1000, 2000)}
    for steps, n in ((1000, 800), (2000, 2000), (1000, 1200), (4000, 3000), (100, 50)):
        assert extra_updates(steps, 5 - 0.5 * math.log(n), reference) == pytest.approx(steps / n - 1)
    assert extra_updates(1000, math.inf, reference) is None
    assert extra_updates(1000, 2.0, {1000: 2.0}) is None
    assert extra_updates(1000, 2.0, {1000: 2.0, 2000: 2.1}) is None  # more updates, and worse: no yardstick


def test_a_line_has_its_best_rate(runs):
    """Rates are compared on the seeds that all of them have; a rate that diverged does not win."""
    lines = {(line.recipe.label, line.steps): line for line in lines_of(read_runs([runs]))}
    assert len(lines) == 5
    plain = lines["features replay, K = 2, M = 2", 1000]
    assert plain.learning_rate == 0.01 and plain.rates == {0.01: 2.25, 0.001: 2.5}
    assert plain.scores == {0: 2.25, 1: 2.35}
    assert lines["back-propagation", 1000].rates == {0.01: 2.2, 0.1: math.inf}
    assert lines["features replay, K = 2, M = 2, --weight-prediction 1.0", 1000].score == 2.2


def test_rates_without_a_common_seed():
    recipe = Recipe("fr", 2, 1, "sgd", ())
    made = [Run(recipe, rate, seed, 10, score, {}) for rate, seed, score in ((0.1, 0, 2.0), (0.2, 1, 1.0))]
    (line,) = lines_of(made)
    assert line.learning_rate == 0.2 and line.rates == {0.1: 2.0, 0.2: 1.0}


def test_a_run_that_is_there_twice_is_refused(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path, name, 2.0)
    with pytest.raises(SettingsError, match=r"one and .*two are both back-propagation with adamw, 1000 up"):
        lines_of(read_runs([tmp_path]))


def test_settings_that_are_zero_make_a_recipe(tmp_path):
    for name, own in (("default", {}), ("zero", {"discrepancy_decay": 0.0})):
        write_run(tmp_path, name, 2.0, method="fr", K=2, **own)
    assert {run.recipe.remedies for run in read_runs([tmp_path])} == {"", "--discrepancy-decay 0.0"}


def test_the_yardstick(tmp_path):
    """Back-propagation on one device with the better M; a run that is no better than a shorter one does not count."""
    for name, bits, own in (
        ("a", None, {"steps": 250}),
        ("b", 2.4, {"steps": 500}),
        ("c", 2.3, {"steps": 1000}),
        ("d", 2.2, {"steps": 1000, "microbatches": 4}),
        ("e", 2.25, {"steps": 2000}),
        ("f", 1.0, {"K": 2}),
    ):
        write_run(tmp_path, name, bits, **own)
    reference = reference_of(lines_of(read_runs([tmp_path])), "adamw")
    assert reference == {250: math.inf, 500: 2.4, 1000: 2.2, 2000: 2.25}
    assert extra_updates(1000, 2.3, reference) == pytest.approx(2**0.5 - 1)
    recipe = Recipe("fr", 2, 1, "adamw", ())
    outside = [is_beyond(Line(recipe, 1000, 0.1, {0: score}, {}), reference) for score in (2.5, 2.4, 2.2, 2.1)]
    assert outside == [True, False, False, True]


def test_updates_only(runs, tmp_path, capsys):
    output = tmp_path / "out"
    assert program.main(["--runs", str(runs), "--updates-only", "--output", str(output)]) == 0
    result = json.loads((output / "time-to-loss.json").read_text())
    rows = {row["label"]: row for row in result["lines"] if row["steps"] == 1000}
    assert rows["back-propagation"]["extra_updates"] == pytest.approx(0)
    assert rows["back-propagation"]["learning_rates"]["0.1"] is None
    fr = rows["features replay, K = 2, M = 2"]
    assert fr["extra_updates"] == pytest.approx(2 ** (0.1 / 0.2) - 1)  # 0.2 bits are a factor of 2
    assert fr["extra_updates_deviation"] > 0 and result["steps"] == []
    text = (output / "time-to-loss.md").read_text()
    assert text.rstrip() in capsys.readouterr().out and "0.1: diverged" in text and "| 41.4%" in text
    assert fr["seeds"] == [0, 1] and not fr["beyond"] and "~-29.3%" in text  # DDG is beyond the curve
    assert (output / "time-to-loss.png").read_bytes().startswith(b"\x89PNG")
    assert program.main(["--runs", str(runs), "--updates-only", "--output", str(output)]) == 2
    assert "Add --overwrite" in capsys.readouterr().err


def fake_parts(problem: Any, method: str, K: int, M: int, own: Any, *, rounds: int) -> Parts:
    """Equal stages whose forward pass over a mini-batch takes 1 in all; the memory is K M bytes, more if predicted."""
    costs = [3.0 / K / M] * K
    return Parts(times_of_costs([3.0 / K] if method == "dp" else costs), K * M + len(own), ())


def test_time_to_loss(runs, monkeypatch):
    monkeypatch.setattr(program, "measure_parts", fake_parts)
    settings = program.TimeToLossSettings(runs=(runs,), ratios=(0.0, 0.01), at=0.0)
    result = program.measure(settings)
    found = {one.label: one for one in candidates(result, "adamw", 2, 2)}
    # K M / (M + K - 1) of GPipe; DDG: K; features replay waits for stage 1: 4/3 of its part.
    assert 3 / found["1F1B"].time("0") == pytest.approx(4 / 3)
    assert 3 / found["data parallelism"].time("0") == pytest.approx(2)
    predicted = found["features replay, K = 2, M = 2, --weight-prediction 1.0"]
    assert predicted.updates == pytest.approx(1) and 3 / predicted.time("0") == pytest.approx(1.5)
    assert predicted.memory == found["features replay, K = 2, M = 2"].memory + 1 == 5
    ddg = found["DDG, K = 2"]  # compared with a pipeline of K micro-batches
    assert ddg.time("0") == pytest.approx(1.5 * 2**-0.5) and ddg.memory == 2
    assert ddg.time("0.01") > ddg.time("0")
    text = tables(result)
    winners = text[text.index("First to the loss") :]
    assert "DDG, K = 2 (2.12)" in winners and "nothing fits" not in winners


def test_no_memory_is_enough(runs, monkeypatch):
    monkeypatch.setattr(program, "measure_parts", fake_parts)
    result = program.measure(program.TimeToLossSettings(runs=(runs,), ratios=(0.0,), at=0.0, memory=(0.1,)))
    assert "nothing fits" in tables(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--runs is missing; give the folders of finished runs"),
        (["--runs", "{empty}"], "holds no finished run: a run's folder has config.json and summary.json"),
        (["--runs", "{runs}", "--at", "0.5"], "--at 0.5 is not one of --ratios 0 0.003"),
        (["--runs", "{runs}", "{other}", "--updates-only"], "--width is 8 in {runs}/bp/1000 and 16 in {other}/one"),
        (["--runs", "{bp}"], "has no method with K > 1 that can be compared with back-propagation"),
        (["--runs", "{bp}", "{dni}"], "--runs has dni, and only fr, bp, ddg, gpipe, 2bw are timed"),
        (["--runs", "{bp}", "{parts}"], "DDG, K = 3: 4 examples make no 3 equal parts. Leave the run out"),
        (["--runs", "{runs}", "--ratios", "0.1", "0"], "--ratios 0.1 0.0: give one or more increasing values"),
    ],
)
def test_bad_settings_end_with_2(arguments, message, runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "other", "one", 2.0, width=16)
    for steps, bits in ((500, 2.4), (1000, 2.2)):
        write_run(tmp_path / "bp", str(steps), bits, steps=steps)
    write_run(tmp_path / "dni", "one", 2.3, method="dni", K=2)
    write_run(tmp_path / "parts", "one", 2.3, method="ddg", K=3)
    places = {name: tmp_path / name for name in ("empty", "other", "bp", "dni", "parts")} | {"runs": runs}
    assert program.main([word.format(**places) for word in arguments]) == 2
    assert message.format(**places) in capsys.readouterr().err


def test_all_gradients_are_added_up():
    problem = problem_of(CONFIG, "adamw")
    width, depth, vocabulary, context = 8, 2, 256, 8
    weights = 12 * depth * width**2 + 13 * depth * width + 2 * width + 2 * vocabulary * width
    features = 4 * context * width
    assert ring_seconds(problem, 2, 0.5) == pytest.approx(0.5 * weights / features)


@pytest.mark.slow
def test_parts_are_measured():
    problem = problem_of(CONFIG, "adamw")
    for method, K, M in (("bp", 1, 1), ("gpipe", 2, 2), ("fr", 2, 2), ("ddg", 2, 1), ("2bw", 2, 2), ("dp", 2, 2)):
        parts = measure_parts(problem, method, K, M, {"weight_prediction": 1.0} if method == "ddg" else {}, rounds=1)
        assert parts.largest_device > 0 and len(parts.cuts) == (K - 1) * (method != "dp")
        fast, slow = (step_seconds(parts, method, K, M, crossing, crossing) for crossing in (0.0, 1.0))
        assert 0 < fast < 5 and (slow > fast + 0.5 or K == 1)
