import contextlib
import errno
import functools
import io
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
import requests

from fr_jax.experiments import cifar
from fr_jax.experiments._run import program as program_module
from fr_jax.experiments._run import records
from fr_jax.experiments._run.console import Console
from fr_jax.models import MODELS, resnet20
from fr_jax.training import classification
from fr_jax.training.checkpoints import Checkpoints
from fr_jax.training.metrics_log import read_rows
from fr_jax.types import Stage

STEPS, STEPS_PER_EPOCH = 50, 22
SMALL = ["--model", "mlp", "--dataset", "digits", "--width", "8"]
SETTINGS = ["--K", "3", *SMALL, "--depth", "4", "--steps", str(STEPS), "--checkpoint-every", "10"]
QUICK = [*SMALL, "--depth", "2", "--steps", "6", "--batch-size", "32", "--log-every", "2", "--test-examples", "64"]
TIMING = {"seconds", "images_per_s"}


def start(folder: pathlib.Path, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "fr_jax.experiments.cifar", "--workdir", str(folder), *more]
    return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 280) -> tuple[int, str, str]:
    with process:  # waits for its end, and closes the pipes
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    assert "Traceback" not in err, err
    return process.returncode, out, err


def wait_for_checkpoint(process: subprocess.Popen[str], folder: pathlib.Path, step: int, timeout: float = 250) -> None:
    until = time.monotonic() + timeout
    while not (folder / "checkpoints" / str(step)).is_dir():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)


def untimed(folder: pathlib.Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def program(in_process, no_pictures):
    """Runs the program in this process -> exit code, stdout, stderr; an empty picture."""
    return functools.partial(in_process, cifar.main)


@pytest.fixture
def refused(program):
    """Runs the program, which must exit with 2 and one readable line, and returns that line."""

    def run(*arguments: object) -> str:
        code, out, err = program(*arguments)
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("fr_jax: ") and err.count("\n") == 1 and len(err) < 1000
        return err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nothing interrupted, for reading only."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cifar.main([*SETTINGS, "--workdir", str(folder)]) == 0
    (folder.parent / "stdout").write_text(out.getvalue())
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> pathlib.Path:
    return shutil.copytree(finished, tmp_path / "run")


# What a run leaves behind


def test_files_of_a_run(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "checkpoints",
        "summary.json",
    }
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["40", "50"]


def test_metrics_of_a_run(finished):
    rows = read_rows(finished / "metrics.jsonl")
    train, test = ([row for row in rows if f"{kind}_loss" in row] for kind in ("train", "test"))
    assert len(train) + len(test) == len(rows)
    for row in train:
        keys = {"step", "epoch", "train_loss", "train_accuracy", "images_per_s", "seconds"}
        assert set(row) == keys | {"dataset"} | {f"gradient_norm/{k}" for k in (1, 2, 3)}
        assert 0 <= row["train_accuracy"] <= 1 and row["train_loss"] > 0 and row["images_per_s"] > 0
    for row in test:
        assert set(row) == {"step", "epoch", "test_loss", "test_accuracy", "seconds"} | {"dataset"}
        assert 0 <= row["test_accuracy"] <= 1 and row["test_loss"] > 0
    assert [row["step"] for row in test] == [22, 44, 50]
    assert [row["step"] for row in train] == [10, 20, 22, 30, 40, 44, 50]
    assert all(math.isclose(row["epoch"], row["step"] / STEPS_PER_EPOCH, abs_tol=1e-6) for row in rows)
    assert {row["dataset"] for row in rows} == {"digits"}
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_summary_of_a_run(finished):
    summary = load(finished / "summary.json")
    keys = "dataset model method K cuts seed steps test_loss test_accuracy best_test_accuracy seconds "
    keys += "step_seconds_median device"
    assert set(keys.split()) | {"diverged"} <= set(summary)
    assert (summary["dataset"], summary["model"], summary["method"], summary["K"]) == ("digits", "mlp", "fr", 3)
    assert (summary["steps"], summary["seed"], summary["diverged"]) == (STEPS, 0, False)
    assert summary["device"] == "3 x cpu" and len(summary["cuts"]) == 2
    assert "device_peak_bytes" not in summary  # a CPU does not count
    accuracies = [row["test_accuracy"] for row in read_rows(finished / "metrics.jsonl") if "test_accuracy" in row]
    assert summary["test_accuracy"] == accuracies[-1] and summary["best_test_accuracy"] == max(accuracies)
    assert summary["seconds"] > 0 and 0 < summary["step_seconds_median"] < summary["seconds"]


def test_config_of_a_run(finished):
    config = load(finished / "config.json")
    assert config["data_source"].startswith("digits (scikit-learn's 1,797 real 8x8 digits")
    assert (config["steps"], config["batch_size"], config["learning_rate"]) == (STEPS, 64, 0.01)
    assert config["resolved_cuts"] == load(finished / "summary.json")["cuts"]
    assert config["devices_used"] == ["cpu:0", "cpu:1", "cpu:2"]
    assert config["versions"]["jax"] == jax.__version__


def test_what_a_run_prints(finished):
    out = (finished.parent / "stdout").read_text()
    assert "mlp, features replay, K = 3; batch 64, learning rate 0.01, 50 steps (2.273 epochs of 22)" in out
    assert "data: digits (scikit-learn's" in out and f"folder: {finished}" in out
    for line in ("stage  layers", "cpu:0", "cpu:1", "cpu:2", "test accuracy", "Done: test accuracy"):
        assert line in out


# Stopping and going on


def test_killed_and_resumed_is_bit_identical(finished, program, tmp_path, program_env, checksums):
    """A process that trains on after the reader of its output has gone away, until it is killed."""
    folder = tmp_path / "run"
    with start(folder, program_env, *SETTINGS) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        wait_for_checkpoint(process, folder, 20)
        process.kill()
        assert process.stderr.read() == "fr_jax: nobody reads the output any more; training goes on.\n"
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    code, out, _ = program(*SETTINGS, "--workdir", folder, "--resume")
    assert code == 0 and "Resuming after step " in out
    assert checksums(folder) == checksums(finished)
    assert untimed(folder) == untimed(finished)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_printed_command_goes_on(
    finished, program, tmp_path, monkeypatch, number, exit_code, checksums
):
    monkeypatch.chdir(tmp_path)
    advanced = Console.advanced

    def signal_once(self: Console, step: int) -> None:
        advanced(self, step)
        if step == 11:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "advanced", signal_once)
        code, out, _ = program(*SETTINGS, "--overwrite")
    assert code == exit_code and "Ctrl-C again" not in out
    assert "everything is saved. Continue with" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "digits-mlp-fr-K3-seed0"  # the default name
    assert (folder / "curves.png").exists() and not (folder / "summary.json").exists()
    again = out.strip().splitlines()[-1].strip()
    assert again.startswith(cifar.CIFAR.call) and "--resume" in again and "--overwrite" not in again
    code, out, _ = program(*shlex.split(again.removeprefix(cifar.CIFAR.call)))
    assert code == 0 and "Resuming after step" in out
    assert checksums(folder) == checksums(finished)
    tests = [[row for row in untimed(run) if "test_loss" in row] for run in (folder, finished)]
    assert tests[0] == tests[1]


def test_a_second_ctrl_c_stops_at_once(program, tmp_path, monkeypatch):
    def interrupt(*arguments: object, **more: object) -> None:
        signal.raise_signal(signal.SIGINT)  # to this thread: two that reach others may count as one
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has started the tests in the background
    monkeypatch.setattr(Console, "advanced", interrupt)
    code, out, err = program("--K", 1, *QUICK, "--workdir", tmp_path)
    assert code == 130 and "stopped at once" in err and "everything is saved" not in out
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_changes_nothing(program, copy):
    before = contents(copy)
    code, out, err = program(*SETTINGS, "--workdir", copy, "--resume")
    assert (code, err) == (0, "")
    assert "is finished: 50 of 50 steps" in out and "add --milestones 1.136364 1.704545" in out
    assert contents(copy) == before


def test_a_finished_run_can_be_extended(program, copy):
    rows = untimed(copy)
    more = [*SETTINGS, "--workdir", copy, "--resume", "--steps", STEPS + 4, "--eval-every", 2, "--devices", 2]
    code, out, _ = program(*more, "--milestones", "1.136364", "1.704545", "--balance", "uniform")
    assert code == 0 and "Resuming after step 50 of 54" in out
    assert untimed(copy)[: len(rows)] == rows
    assert [row["step"] for row in untimed(copy)[len(rows) :]] == [52, 52, 54, 54]
    summary = load(copy / "summary.json")
    assert (summary["steps"], summary["device"]) == (54, "2 x cpu")
    assert load(copy / "config.json")["resolved_cuts"] == summary["cuts"]


def test_resuming_for_fewer_steps_than_done_is_refused(program, copy):
    before = contents(copy)
    fewer = ["--steps", 30, "--milestones", "1.136364", "1.704545"]
    code, _, err = program(*SETTINGS, *fewer, "--workdir", copy, "--resume")
    assert code == 2 and "has done 50 steps, more than the 30 asked for" in err
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"learning-rate": "0.1", "K": "2", "batch-size": "32", "dataset": "synthetic", "dtype": "bfloat16"},
            ["0.1 and was 0.01", "2 and was 3", "32 and was 64", "synthetic and was", "bfloat16 and was float32"],
        ),
        ({"seed": "1", "method": "bp", "cuts": "2 3"}, ["1 and was 0", "bp and was fr", "2 3 and was"]),
        ({"model": "resnet8"}, ["resnet8 and was mlp"]),
    ],
)
def test_resuming_with_other_settings_is_refused(refused, finished, changes, named):
    before = contents(finished)
    words = [word for name, value in changes.items() for word in (f"--{name}", *value.split())]
    settings = [w for w in SETTINGS if w not in ("--width", "8", "--depth", "4")] if "model" in changes else SETTINGS
    line = refused(*settings, *words, "--workdir", finished, "--resume")
    assert "--resume cannot continue" in line and "config.json" in line
    assert all(f"--{name} is {value}" in line for name, value in zip(changes, named, strict=True)), line
    assert contents(finished) == before


def test_resuming_for_longer_says_which_milestones(refused, finished):
    line = refused(*SETTINGS, "--steps", "60", "--workdir", finished, "--resume")
    assert "to train for longer, add --milestones 1.136364 1.704545" in line


def test_resuming_nothing_starts_from_the_beginning(program, tmp_path):
    code, out, _ = program("--K", 1, *QUICK, "--steps", 2, "--workdir", tmp_path / "new", "--resume")
    assert code == 0 and "There is no checkpoint in" in out and "starting from the beginning" in out


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(program, finished, copy, checksums):
    biggest = max((copy / "checkpoints" / "50").rglob("*"), key=lambda path: path.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    code, out, _ = program(*SETTINGS, "--workdir", copy, "--resume")
    assert code == 0 and "The checkpoint of step 50" in out and "is damaged" in out
    assert "Resuming after step 40 of 50" in out
    assert checksums(copy) == checksums(finished)
    assert untimed(copy) == untimed(finished)


def test_all_checkpoints_damaged(program, copy):
    for step in ("40", "50"):
        shutil.rmtree(copy / "checkpoints" / step)
        (copy / "checkpoints" / step).mkdir()
    before = contents(copy)
    code, _, err = program(*SETTINGS, "--workdir", copy, "--resume")
    assert code == 1 and "every checkpoint" in err and "is damaged" in err
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["summary.json", None])
def test_a_folder_with_another_run_is_refused(refused, copy, name):
    if name:
        (copy / name).unlink()
    before = contents(copy)
    line = refused(*SETTINGS, "--workdir", copy)
    assert ("an unfinished run" if name else "a finished run") in line
    assert "--resume" in line and "--workdir" in line and "--overwrite" in line
    assert contents(copy) == before


def test_overwriting(program, copy):
    (copy / "notes.txt").write_text("the user's own")
    code, _, _ = program("--K", 1, *QUICK, "--workdir", copy, "--overwrite")
    assert code == 0 and load(copy / "summary.json")["K"] == 1
    assert [row["step"] for row in untimed(copy)] == [2, 4, 6, 6]
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["6"]
    assert (copy / "notes.txt").read_text() == "the user's own"


def test_a_run_that_another_process_finishes_meanwhile_is_left_alone(refused, finished, tmp_path, monkeypatch):
    build = program_module._build

    def build_slowly(settings, data, folder):
        shutil.copytree(finished, folder.path)
        return build(settings, data, folder)

    monkeypatch.setattr(program_module, "_build", build_slowly)
    line = refused("--K", 1, *QUICK, "--workdir", tmp_path / "run")
    assert "holds a finished run, which is not overwritten" in line
    assert contents(tmp_path / "run") == contents(finished)


def test_overwriting_deletes_nothing_before_training_can_start(program, refused, copy, monkeypatch):
    before = contents(copy)
    refused(*SETTINGS, "--workdir", copy, "--overwrite", "--K", 7)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program_module, "initial_state", interrupted)
    code, _, err = program(*SETTINGS, "--workdir", copy, "--overwrite")
    assert code == 130 and "Traceback" not in err
    assert contents(copy) == before


# What goes wrong


def test_divergence(program, tmp_path, monkeypatch):
    write, written = Checkpoints._write, []

    def remember(self, step, arrays, index):
        written.extend(array for array in arrays.values() if array.dtype.kind not in "biu")
        write(self, step, arrays, index)

    monkeypatch.setattr(Checkpoints, "_write", remember)
    words = ["--K", 2, *QUICK, "--depth", 4, "--learning-rate", 1e30, "--checkpoint-every", 1]
    code, _, err = program(*words, "--workdir", tmp_path)
    assert code == 3
    last = max(Checkpoints(tmp_path / "checkpoints").steps())
    assert "the run diverged: " in err and " in stage " in err and f" at step {last + 1}; " in err
    assert f"the last good checkpoint is that of step {last}" in err and err.count("\n") == 1
    summary = load(tmp_path / "summary.json")
    assert summary["diverged"] is True and summary["steps"] > last
    assert (tmp_path / "curves.png").exists()
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["train_loss"] is None
    assert written and all(np.isfinite(array.astype(np.float32)).all() for array in written)


def test_divergence_without_a_checkpoint(program, tmp_path):
    code, _, err = program("--K", 1, *QUICK, "--learning-rate", "1e38", "--workdir", tmp_path)
    assert code == 3 and "in stage 1 at step " in err and "there is no checkpoint yet" in err
    assert load(tmp_path / "summary.json")["test_accuracy"] is None


@pytest.mark.parametrize("skip", [True, False])
def test_a_mini_batch_that_is_not_finite(program, tmp_path, monkeypatch, skip):
    """Stage 1 is a step late, so that both stages drop their update in the row of step 4."""
    make = classification.input_pipeline

    def spoilt(*args, **options):
        pipeline = make(*args, **options)

        def train_batch(step):
            batch = pipeline.train_batch(step)
            return batch._replace(inputs=batch.inputs * (np.nan if step == 2 else 1.0))

        return pipeline._replace(train_batch=train_batch)

    monkeypatch.setattr(classification, "input_pipeline", spoilt)
    words = ["--K", 2, *QUICK, "--workdir", tmp_path, *([] if skip else ["--no-skip-nonfinite"])]
    code, out, err = program(*words)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "train_loss" in row]
    if not skip:
        assert code == 3 and "the run diverged: loss = nan in stage 2 at step 3" in err
        return
    assert code == 0 and np.isfinite(load(tmp_path / "summary.json")["test_accuracy"])
    assert [[row.get(f"skipped/{k}") for k in (1, 2)] for row in rows] == [[None, None], [1, 1], [None, None]]
    assert all(row["train_loss"] is not None for row in rows)
    assert out.count("a loss or gradient was not finite. Stage 1, 2 dropped the update; training goes on") == 1


def test_disk_full_at_a_checkpoint(program, tmp_path, monkeypatch):
    write = Checkpoints._write

    def full_at_4(self, step, arrays, index):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, step, arrays, index)

    settings = ["--K", 2, *QUICK, "--checkpoint-every", 2, "--workdir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write", full_at_4)
        code, _, err = program(*settings)
    assert code == 1 and "disk full: the checkpoint of step 4" in err
    assert "the earlier checkpoint of step 2 is intact" in err and err.count("fr_jax: ") == 1
    code, out, _ = program(*settings, "--resume")
    assert code == 0 and "Resuming after step 2 of 6" in out
    assert [row["step"] for row in untimed(tmp_path)] == [2, 4, 6, 6]


def test_a_folder_that_cannot_be_made(program, tmp_path, monkeypatch):
    def denied(*arguments: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "run"))

    monkeypatch.setattr(pathlib.Path, "mkdir", denied)
    code, _, err = program("--K", 1, *QUICK, "--workdir", tmp_path / "run")
    assert code == 1 and "Permission denied" in err and str(tmp_path) in err


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--method", "x"], ["--method x", "fr, bp"]),
        (["--K", "0"], ["--K 0", "at least 1"]),
        (["--K", "7"], ["--K 7", "mlp", "6 layers", "1 to 6", "smaller K"]),
        (["--K", "3", "--cuts", "2"], ["--cuts 2 make 2 stages", "K-1 = 2", "--K 2"]),
        (["--K", "3", "--cuts", "4", "2"], ["(4, 2)", "increase strictly within 1 .. 5"]),
        (["--batch-size", "2000"], ["2000", "1,433 training examples", "Try 1433"]),
        (["--data-parallel", "2", "--batch-size", "33"], ["33", "multiple of 2", "Try 32"]),
        (["--devices", "100"], ["--devices 100", "JAX sees 8", "at most 8"]),
        (["--steps", "3", "--epochs", "2"], ["--steps and --epochs", "Drop one"]),
        (["--learning-rate", "-1"], ["--learning-rate -1.0", "at least 0"]),
        (["--dataset", "cifar10", "--data-dir", "/nonexistent"], ["/nonexistent", "does not exist", "Correct it"]),
        (["--preset", "papr"], ["--preset papr", "Did you mean paper?"]),
        (["--tensorboard", "--batch-stats", "both", "--method", "bp"], ["--batch-stats both", "--method fr"]),
    ],
)
def test_bad_arguments(refused, tmp_path, arguments, texts):
    line = refused("--model", "mlp", "--dataset", "digits", "--workdir", tmp_path / "run", *arguments)
    assert all(text in line for text in texts), line
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file is not a folder" in refused(*QUICK, "--workdir", tmp_path / "file")
    assert "file is not a folder" in refused(*QUICK, "--workdir", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_of_the_program_itself_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(program_module, "initial_state", broken)
    with pytest.raises(ValueError, match="a bug"):
        cifar.main(["--K", "1", *QUICK, "--workdir", str(tmp_path)])


# Data without a network


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name in ("FR_JAX_CACHE", "TFDS_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def no_network(*arguments: object, **more: object) -> None:
        raise requests.ConnectionError("blocked by the test")

    monkeypatch.setattr(requests, "head", no_network)
    monkeypatch.chdir(tmp_path)


def test_auto_without_a_network_says_so_and_trains_on_digits(program, offline, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(program_module, "plot_curves", lambda runs, path, **more: drawn.append(more))
    code, out, _ = program("--K", 1, "--model", "mlp", "--steps", 2)
    assert code == 0
    (line,) = [line for line in out.splitlines() if "!!!" in line]
    assert "NO CIFAR-10" in line and "stand-in digits" in line
    folder = tmp_path / "runs" / "digits-mlp-fr-K1-seed0"
    assert "on digits after 2 steps" in out
    assert load(folder / "config.json")["dataset"] == load(folder / "summary.json")["dataset"] == "digits"
    assert "scikit-learn" in load(folder / "config.json")["data_source"]
    assert {row["dataset"] for row in read_rows(folder / "metrics.jsonl")} == {"digits"}
    (texts,) = drawn
    assert "mlp on digits" in texts["title"] and texts["data_source"].startswith("digits (scikit-learn")


def test_cifar10_by_name_is_strict(refused, offline, tmp_path):
    line = refused("--dataset", "cifar10", "--model", "mlp")
    assert "CIFAR-10 is not on this machine" in line and "--data-dir" in line and "--dataset digits" in line
    assert not (tmp_path / "runs").exists()


# Every kind of run


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "bp", "--K", "2", "--nesterov"],
        ["--K", "2", "--momentum", "0", "--weight-decay", "0", "--dtype", "bfloat16"],
        ["--K", "2", "--data-parallel", "2", "--balance", "uniform"],
        ["--K", "2", "--devices", "1", "--depth", "3", "--cuts", "2", "--batch-stats", "replay"],
        ["--K", "3", "--depth", "3", "--dataset", "synthetic", "--balance", "time"],
    ],
)
def test_kinds_of_runs(program, tmp_path, arguments, checksums):
    code, out, _ = program(*QUICK, *arguments, "--workdir", tmp_path)
    assert code == 0, out
    summary = load(tmp_path / "summary.json")
    assert summary["steps"] == 6 and not summary["diverged"] and 0 <= summary["test_accuracy"] <= 1
    if "--cuts" in arguments:
        assert summary["cuts"] == [2]
    if "--data-parallel" in arguments:
        assert (summary["device"], summary["cuts"]) == ("4 x cpu", [1]) and "cpu:2,3" in out
    if "--devices" in arguments:
        assert summary["device"] == "1 x cpu"
    if "bfloat16" in arguments:
        assert_only_parameters_are_float32(checksums(tmp_path))


def assert_only_parameters_are_float32(checksums: dict[str, Any]) -> None:
    """Features in flight are bfloat16, and parameters are not."""
    leaves = {name: kind for name, (kind, *_) in checksums.items() if isinstance(kind, str)}
    assert {"bfloat16", "float32"} <= {kind.split("[")[0] for kind in leaves.values()}
    params = [kind for name, kind in leaves.items() if name.startswith("params/")]
    assert params and all(kind.startswith("float32") for kind in params)


def test_profile_and_tensorboard_and_peaks_of_memory(program, tmp_path, monkeypatch):
    of_a_gpu = lambda devices: {f"gpu:{device.id}": 2_500_000 for device in devices} | {"gpu:7": None}
    monkeypatch.setattr(records, "device_peaks", of_a_gpu)  # a CPU does not count
    code, out, _ = program("--K", 1, *QUICK, "--steps", 4, "--profile", "--tensorboard", "--workdir", tmp_path)
    assert code == 0
    assert "Peak of memory: gpu:0 2 MB" in out
    assert load(tmp_path / "summary.json")["device_peak_bytes"] == {"gpu:0": 2_500_000}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert [path for path in (tmp_path / "tensorboard").rglob("*tfevents*") if path.stat().st_size > 100]


@pytest.mark.slow
def test_resnet_in_bfloat16(program, tmp_path, monkeypatch, checksums):
    def stem_block_and_head(**options: Any) -> list[Stage]:
        layers = resnet20(**options)
        return [*layers[:2], layers[-1]]

    monkeypatch.setitem(MODELS, "resnet20", stem_block_and_head)  # compiles in a fifth of the time
    small = ["--model", "resnet20", "--dataset", "digits", "--steps", 2, "--batch-size", 8, "--K", 2]
    code, out, _ = program(*small, "--dtype", "bfloat16", "--batch-stats", "both", "--workdir", tmp_path)
    assert code == 0, out
    assert_only_parameters_are_float32(checksums(tmp_path))


# The whole thing


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_resnet20_killed_and_resumed_is_bit_identical(tmp_path, program_env, checksums):
    settings = ["--K", "4", "--dataset", "digits", "--steps", "30", "--checkpoint-every", "8", "--eval-every", "15"]
    settings += ["--batch-size", "16"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert finish(start(whole, program_env, *settings), 900)[0] == 0
    process = start(folder, program_env, *settings)
    wait_for_checkpoint(process, folder, 16, 900)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    code, out, _ = finish(start(folder, program_env, *settings, "--resume"), 900)
    assert code == 0 and "Resuming after step " in out
    assert checksums(folder) == checksums(whole)
    assert untimed(folder) == untimed(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_with_four_stages_by_default(tmp_path, program_env):
    optimised = {**program_env, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}  # as its user runs it
    code, out, _ = finish(start(tmp_path / "run", optimised, "--K", "4", "--dataset", "digits"), timeout=850)
    assert code == 0, out
    assert load(tmp_path / "run" / "summary.json")["test_accuracy"] > 0.95
