import functools
import json
import pathlib
import re
import shutil

import pytest

from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._run import program
from fr_jax.experiments.compare import __main__ as compare
from fr_jax.experiments.compare import report
from fr_jax.experiments.compare.__main__ import CompareSettings, plan
from fr_jax.plotting.comparison import plot_comparison
from fr_jax.training.interrupt import StopRequest
from fr_jax.training.metrics_log import read_rows

QUICK = ["--model", "mlp", "--depth", "2", "--width", "8", "--dataset", "digits", "--batch-size", "16", "--steps", "12"]
QUICK += ["--test-examples", "64"]


@pytest.fixture
def run(in_process, no_pictures, monkeypatch):
    """Runs the program in this process -> exit code, stdout, stderr; empty pictures."""
    monkeypatch.setattr(report, "plot_comparison", lambda lines, path, **texts: path.touch())
    return functools.partial(in_process, compare.main)


def names(**settings: object) -> list[str]:
    return [one.name for one in plan(CompareSettings(**settings))]


def losses(folder: pathlib.Path) -> list[float]:
    return [row["train_loss"] for row in read_rows(folder / "metrics.jsonl") if "train_loss" in row]


def test_plan_is_methods_by_K_by_seeds_and_bp_once_a_seed():
    assert names(methods=("bp", "fr"), K=(2, 3), seeds=(0, 7)) == [
        "bp-K1-seed0",
        "fr-K2-seed0",
        "fr-K3-seed0",
        "bp-K1-seed7",
        "fr-K2-seed7",
        "fr-K3-seed7",
    ]


def test_plan_gives_every_method_the_settings_that_it_has():
    runs = plan(
        CompareSettings(methods=("dni", "gpipe", "fr"), K=(2,), microbatches=("8",), accumulate=2, momentum=0.5)
    )
    own = [(one.settings.microbatches, one.settings.accumulate, one.settings.momentum) for one in runs]
    assert own == [(None, None, 0.5), (8, None, 0.5), (8, 2, 0.5)]


def test_plan_leaves_out_what_means_nothing_to_a_method_of_all_examples():
    given = {"learning_rate": 0.1, "momentum": 0.5, "batch_size": 64, "model": "mlp"}
    bp, admm = (one.settings for one in plan(CompareSettings(methods=("bp", "admm"), K=(3,), **given)))
    assert (bp.learning_rate, bp.momentum, bp.batch_size, bp.K) == (0.1, 0.5, 64, 1)
    assert (admm.learning_rate, admm.momentum, admm.batch_size, admm.K) == (None, 0.9, None, 1)
    assert plan(CompareSettings(methods=("admm",), model="mlp", batch_size=64))[0].settings.batch_size == 64


def test_plan_runs_several_numbers_of_micro_batches():
    plain = {"methods": ("bp", "fr", "gpipe", "2bw", "dni"), "K": (4,)}
    usual = ["bp-K1-seed0", "fr-K4-seed0", "gpipe-K4-seed0", "2bw-K4-seed0", "dni-K4-seed0"]
    assert names(**plain) == usual
    runs = plan(CompareSettings(microbatches=("4", "8", "bp=1", "fr=1", "fr=8"), **plain))
    assert [one.name for one in runs] == [
        *("bp-K1-seed0", "fr-K4-seed0", "fr-K4-M8-seed0", "gpipe-K4-seed0", "gpipe-K4-M8-seed0"),
        *("2bw-K4-M4-seed0", "2bw-K4-seed0", "dni-K4-seed0"),
    ]
    assert [one.settings.microbatches for one in runs] == [1, 1, 8, 4, 8, 4, 8, None]
    assert [one.entry.label for one in runs][1:4] == [
        *("features replay, K = 4", "features replay, K = 4, M = 8", "GPipe, K = 4, M = 4")
    ]
    assert names(methods=("fr",), vary=("microbatches", "1", "8")) == ["fr-K4-seed0", "fr-K4-M8-seed0"]


def test_runs_of_earlier_comparisons_have_the_methods_own_micro_batches():
    assert report.Entry.of(["gpipe", 2, "", 0]) == report.Entry("gpipe", 2, "", 0, M=4)
    assert report.Entry.of(["gpipe", 2, "", 0, 8]).label == "GPipe, K = 2, M = 8"


def test_plan_varies_a_setting_where_it_is_one():
    assert names(methods=("bp", "blockprop"), K=(2,), vary=("h-steps", "1", "4")) == [
        "bp-K1-seed0",
        "blockprop-K2-h-steps1-seed0",
        "blockprop-K2-h-steps4-seed0",
    ]
    runs = plan(CompareSettings(methods=("bp",), vary=("momentum", "0", "0.9")))
    assert [one.settings.momentum for one in runs] == [0.0, 0.9]
    assert [one.entry.label for one in runs] == ["back-propagation, momentum 0.0", "back-propagation, momentum 0.9"]


def test_plan_varies_what_a_preset_sets():
    settings = CompareSettings(
        methods=("blockprop",), K=(2,), vary=("h-steps", "1", "2"), preset="blockprop", h_steps=4, depth=2, model="mlp"
    )
    assert [one.settings.h_steps for one in plan(settings)] == [1, 2]


def test_plan_takes_learning_rates_by_method():
    runs = plan(CompareSettings(methods=("bp", "fr", "ddg"), learning_rate=0.3, learning_rates=("fr=0.1",)))
    assert [one.settings.learning_rate for one in runs] == [0.3, 0.1, 0.3]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"methods": ("bp", "adam")}, "--methods adam is unknown; it can be fr, bp, ddg"),
        ({"methods": ()}, "--methods none: give one or more distinct values"),
        ({"K": (2, 2)}, "--K 2 2: give one or more distinct values, each at least 1"),
        ({"K": (0,)}, "--K 0 is out of range"),
        ({"seeds": (-1,)}, "--seeds -1 is out of range"),
        ({"h_steps": 3}, "--h-steps 3 is a setting of --method blockprop, not of bp, fr, ddg, dni. Drop"),
        ({"vary": ("h-steps", "1")}, "--vary h-steps is a setting of blockprop, not compared here. Drop it"),
        ({"vary": ("momentum",)}, "--vary momentum needs a setting and its values, such as --vary h-steps 1 2 4"),
        ({"vary": ("workdir", "a")}, "--vary workdir a needs a setting .* It can be epochs, steps"),
        ({"vary": ()}, "--vary  needs a setting and its values"),
        ({"vary": ("momentum", "0.9", "0.90")}, "--vary momentum 0.9 0.90 names a value twice"),
        ({"vary": ("learning-rate", "1"), "learning_rates": ("fr=0.1",)}, "--learning-rate and --vary learning-rate"),
        ({"learning_rates": ("fr=0.1", "fr=0.2")}, "--learning-rates names fr twice"),
        ({"preset": "blockprop", "h_steps": 4}, "--preset blockprop sets --h-steps, a setting of --method blockprop"),
        ({"milestones": (float("inf"),)}, "--milestones inf is out of range; each must be at least 0, and finite"),
        ({"vary": ("momentum", "0.5"), "momentum": 0.1}, "--momentum and --vary momentum were both given"),
        ({"learning_rates": ("fr",)}, "--learning-rates fr is malformed; write METHOD=RATE"),
        ({"learning_rates": ("gpipe=0.1",)}, "--learning-rates gpipe=0.1 names a method that is not compared"),
        ({"steps": 3, "epochs": 3}, "one length"),
        ({"microbatches": ("fr=x",)}, "--microbatches fr=x: fr=x is malformed; write M or METHOD=M, such as 8 or fr=8"),
        ({"microbatches": ("0",)}, "--microbatches 0: 0 is malformed"),
        ({"microbatches": ("8", "gpipe=4")}, "--microbatches 8 gpipe=4: gpipe is not among --methods. Drop gpipe=4"),
        ({"microbatches": ("dni=4",)}, "--microbatches dni=4: dni has no micro-batches. Drop dni=4"),
        ({"microbatches": ("fr=4", "fr=4")}, "--microbatches fr=4 fr=4 names a number twice"),
        ({"methods": ("dni",), "microbatches": ("4",)}, "--microbatches 4: none of dni has micro-batches. Drop"),
        ({"methods": ("2bw",), "microbatches": ("2",)}, "--microbatches 2 are too few for the --K 4 stages of 2bw"),
    ],
)
def test_plan_says_what_is_valid(change, complaint):
    with pytest.raises(SettingsError, match=complaint):
        plan(CompareSettings(**change))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Four runs; DDG's diverges."""
    home = tmp_path_factory.mktemp("compared")
    methods = ["--methods", "bp", "gpipe", "fr", "ddg", "--K", "2", "--microbatches", "1"]
    methods += ["--learning-rate", "0.1", "--learning-rates", "ddg=1e20"]
    of_all = lambda lines, *args, **texts: len(lines) < 4 or plot_comparison(lines, *args, **texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "plot_curves", lambda *args, **texts: None)
        patch.setattr(report, "plot_comparison", of_all)
        assert compare.main([*QUICK, *methods, "--workdir", str(home)]) == 0
    return home, methods


@pytest.fixture
def copy(compared, tmp_path):
    return pathlib.Path(shutil.copytree(compared[0], tmp_path / "copy"))


def test_table_and_picture(compared):
    home, _ = compared
    content = json.loads((home / "comparison.json").read_text())
    lines = {line["method"]: line for line in content["lines"]}
    assert set(lines) == {"bp", "gpipe", "fr", "ddg"}
    assert [lines[method]["diverged"] for method in ("bp", "gpipe", "fr", "ddg")] == [[False]] * 3 + [[True]]
    for method in ("bp", "gpipe", "fr"):
        summary = json.loads(next(home.glob(f"{method}-K*-seed0/summary.json")).read_text())
        assert lines[method]["test_error"] == [pytest.approx(100 * (1 - summary["test_accuracy"]), abs=1e-3)]
        assert lines[method]["seconds"] == [summary["seconds"]]
        assert lines[method]["learning_rate"] == 0.1
    table = (home / "table.md").read_text()
    assert "| DDG, K = 2 (diverged)" in table and "| features replay, K = 2 " in table
    assert f"{lines['fr']['test_error'][0]:.2f}" in table
    assert "python -m fr_jax.experiments.compare --methods bp gpipe fr ddg" in table
    assert (home / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_all_start_from_the_same_weights_and_see_the_same_mini_batches(compared):
    """GPipe with one microbatch is back-propagation."""
    home, _ = compared
    assert losses(home / "gpipe-K2-M1-seed0") == pytest.approx(losses(home / "bp-K1-seed0"), rel=1e-4)
    assert losses(home / "fr-K2-seed0") != pytest.approx(losses(home / "bp-K1-seed0"), rel=1e-3)


def test_what_is_finished_is_not_repeated(compared, copy, run, monkeypatch):
    monkeypatch.setattr(program, "run", lambda *args, **kwargs: pytest.fail("a finished run was repeated"))
    code, out, err = run(*QUICK, *compared[1], "--workdir", copy)
    assert code == 0, err
    assert out.count("is finished already") == 4


def test_what_was_stopped_goes_on(compared, copy, run):
    folder = copy / "fr-K2-seed0"
    before = losses(folder)
    for path in (folder / "summary.json", copy / "table.md", copy / "comparison.png"):
        path.unlink()
    code, out, err = run(*QUICK, *compared[1], "--workdir", copy)
    assert code == 0, err
    assert out.count("is finished already") == 3 and "[3/4] fr-K2-seed0\n" in out
    assert losses(folder) == before
    assert (copy / "comparison.png").exists() and "features replay" in (copy / "table.md").read_text()


def test_further_seeds_join(copy, run):
    flags = ["--methods", "bp", "--K", "2", "--learning-rate", "0.1", "--seeds", "0", "1"]
    code, out, err = run(*QUICK, *flags, "--workdir", copy)
    assert code == 0, err
    assert out.count("is finished already") == 1
    assert "±" in (copy / "table.md").read_text()


def test_a_folder_with_other_settings_is_refused(compared, copy, run):
    code, _, err = run(*QUICK, *compared[1], "--workdir", copy, "--momentum", 0.5)
    assert code == 2 and err.count("\n") == 1
    assert "bp-K1-seed0 holds a run with other settings: --momentum is 0.5 and was 0.9" in err


def test_overwrite_starts_again(copy, run):
    flags = ["--methods", "bp", "--K", "2", "--learning-rate", "0.1", "--momentum", "0.5", "--overwrite"]
    code, _, err = run(*QUICK, *flags, "--workdir", copy)
    assert code == 0, err
    assert json.loads((copy / "bp-K1-seed0" / "config.json").read_text())["momentum"] == 0.5


def test_overwrite_deletes_all_that_is_asked_for_at_once(copy, run, monkeypatch):
    """So that what was stopped then goes on, and nothing old is taken for new."""
    monkeypatch.setattr(program, "run", lambda *args, **kwargs: 130)
    flags = ["--methods", "bp", "fr", "--K", "2", "--learning-rate", "0.2"]
    assert run(*QUICK, *flags, "--workdir", copy, "--overwrite")[0] == 130
    assert not list((copy / "bp-K1-seed0").iterdir()) and not list((copy / "fr-K2-seed0").iterdir())
    assert (copy / "ddg-K2-seed0" / "summary.json").exists()


def test_a_signal_in_the_last_step_of_a_run_stops_the_comparison(copy, run, monkeypatch):
    def finish(*args: object, stop: StopRequest, **kwargs: object) -> int:
        stop.signal = 2
        return program.FINISHED

    monkeypatch.setattr(program, "run", finish)
    code, out, _ = run(*QUICK, "--methods", "bp", "fr", "--K", "2", "--seeds", "5", "--workdir", copy)
    assert code == 130 and out.count("[1/2]") == 1 and "[2/2]" not in out
    assert "Continue with\n  python -m fr_jax.experiments.compare" in out


def test_a_longer_run_is_not_taken_for_a_shorter_one(copy, run):
    """With the milestones of the longer run, which are those of half as many steps."""
    flags = ["--methods", "bp", "--K", "2", "--learning-rate", "0.1"]
    milestones = json.loads((copy / "bp-K1-seed0" / "config.json").read_text())["milestones"]
    code, _, err = run(*QUICK, *flags, "--steps", 6, "--milestones", *milestones, "--workdir", copy)
    assert code == 2 and "holds a run of 12 steps, more than the 6 asked for" in err


def test_an_earlier_comparison_in_the_folder_stays_in_the_table(compared, copy, run, monkeypatch):
    monkeypatch.setattr(program, "run", lambda *args, **kwargs: pytest.fail("a finished run was repeated"))
    flags = ["--methods", "bp", "--K", "2", "--learning-rate", "0.1"]
    code, out, err = run(*QUICK, *flags, "--workdir", copy)
    assert code == 0, err
    assert "| features replay, K = 2" in out and "4 of 4 runs are over" in out


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("summary.json", "{}", "summary.json lacks device, diverged, .* Remove that file"),
        ("summary.json", "garbage", "summary.json cannot be read"),
        ("metrics.jsonl", "garbage\n{}\n", "the metrics of .* cannot be read.* Move that folder away"),
    ],
)
def test_damaged_files_are_named(compared, copy, run, name, content, complaint):
    (copy / "fr-K2-seed0" / name).write_text(content)
    code, _, err = run(*QUICK, *compared[1], "--workdir", copy)
    assert code == 2 and re.search(complaint, err) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--microbatches", 3], "a mini-batch of 16 cannot be split into 3 equal parts, .* Try 15"),
        (["--batch-size", 5000], "--batch-size 5000 is too large; it must be at most the 1,433 training examples"),
    ],
)
def test_what_does_not_fit_the_data_is_said_before_anything_is_trained(run, tmp_path, flags, complaint):
    code, _, err = run(*QUICK, "--methods", "bp", "gpipe", "--K", 2, *flags, "--workdir", tmp_path / "none")
    assert code == 2 and re.search(complaint, err) and not (tmp_path / "none").exists()


def test_too_large_a_K_is_named_before_anything_is_trained(run, tmp_path):
    code, _, err = run(*QUICK, "--methods", "bp", "fr", "--K", 2, 9, "--workdir", tmp_path / "none")
    assert code == 2 and "--K 9 stages were asked of mlp, which has 2 layers" in err
    assert not (tmp_path / "none").exists()


def test_help_names_the_flags(run):
    code, out, _ = run("--help")
    assert code == 0
    for flag in ("--methods", "--K", "--seeds", "--vary", "--learning-rates", "--workdir", "--dataset", "--h-steps"):
        assert flag in out
