"""The language model's program."""

import contextlib
import functools
import io
import json
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from fr_jax.experiments import cifar, lm
from fr_jax.experiments._cli.checks import check, resolve
from fr_jax.experiments._cli.command_line import parse
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._run.console import Console
from fr_jax.experiments._run.tasks import kind_of
from fr_jax.experiments.compare.__main__ import main as compare
from fr_jax.training.metrics_log import read_rows

SMALL = ["--depth", "2", "--width", "8", "--heads", "2", "--context", "8", "--batch-size", "4"]
QUICK = [*SMALL, "--steps", "12", "--checkpoint-every", "5", "--eval-every", "6", "--warmup", "2", "--log-every", "2"]
QUICK += ["--test-examples", "6", "--sample-bytes", "6"]
TIMING = {"seconds", "tokens_per_s"}


def untimed(folder: pathlib.Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def load(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("text") / "my texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text("".join(f"{i} times {j} is {i * j}.\n" for j in range(20)))
    return folder


@pytest.fixture
def program(in_process, no_pictures):
    """Runs the program in this process -> exit code, stdout, stderr; an empty picture."""
    return functools.partial(in_process, lm.main)


@pytest.fixture
def refused(program, tmp_path):
    """Runs the program, which must exit with 2 and one readable line, and returns that line."""

    def run(*arguments: object) -> str:
        code, _, err = program(*arguments, "--workdir", tmp_path / "refused")
        assert code == 2 and err.startswith("fr_jax: ") and err.count("\n") == 1, (code, err)
        assert not (tmp_path / "refused").exists()
        return err

    return run


def test_defaults():
    settings = parse("lm", lm.LM.defaults, [])
    check(settings)
    resolved = resolve(settings, "python", 80_000)
    assert (resolved.model, resolved.method, resolved.K, resolved.optimizer) == ("gpt", "ddg", 4, "muon")
    assert (resolved.depth, resolved.heads, resolved.positions) == (8, 4, "rotary")
    assert resolved.workdir == pathlib.Path("runs/python-gpt-ddg-K4-seed0")


def test_the_network_of_the_gpu_preset():
    settings = parse("lm", lm.LM.defaults, ["--preset", "gpt2", "--K", "8"])
    check(settings)
    assert (settings.dtype, settings.context, settings.K) == ("bfloat16", 1024, 8)
    layers = kind_of("gpt").layers(resolve(settings, "python", 10**6), None)
    assert len(layers) == 2 * 18 + 2


def test_micro_batches_are_for_methods_that_have_them():
    for method, card in METHODS.items():
        settings = parse("lm", lm.LM.defaults, ["--method", method])
        if card.models:
            with pytest.raises(SettingsError, match=f"--method {method} trains dense networks only, --model mlp, and"):
                check(settings)
            continue
        check(settings)
        assert settings.microbatches == (4 if "microbatches" in card.defaults else None)


def test_a_length_in_epochs_replaces_that_of_the_preset():
    settings = parse("lm", lm.LM.defaults, ["--epochs", "2"])
    check(settings)
    assert resolve(settings, "python", 1600).steps == 200


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory) -> pathlib.Path:
    """The folder of a run, for reading only; what it printed is beside it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert lm.main(["--K", "2", *QUICK, "--text", str(texts), "--workdir", str(folder)]) == 0
    (folder.parent / "stdout").write_text(out.getvalue())
    return folder


def test_files_of_a_run(finished):
    names = {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "summary.json"}
    assert {path.name for path in finished.iterdir()} == names
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = untimed(finished)
    train, test = ([row for row in rows if f"{kind}_loss" in row] for kind in ("train", "test"))
    assert [row["step"] for row in test] == [6, 12]
    assert set(test[0]) == {"step", "epoch", "dataset", "test_loss", "test_bits_per_byte"}
    norms = {f"gradient_norm/{k}" for k in (1, 2)}
    assert set(train[-1]) == {"step", "epoch", "dataset", "train_loss", "train_bits_per_byte"} | norms
    assert all(row["tokens_per_s"] > 0 for row in read_rows(finished / "metrics.jsonl") if "train_loss" in row)
    summary, config = load(finished / "summary.json"), load(finished / "config.json")
    assert summary["test_bits_per_byte"] == test[-1]["test_bits_per_byte"] < 8
    assert summary["best_test_bits_per_byte"] <= summary["test_bits_per_byte"]
    assert (summary["dataset"], summary["model"], summary["diverged"]) == ("text", "gpt", False)
    assert config["data_source"].startswith("text: ") and config["data_checksum"] > 0


def test_what_a_run_prints(finished, texts):
    out = (finished.parent / "stdout").read_text()
    assert "gpt, DDG, K = 2, M = 4; batch 4, learning rate 0.012, 12 steps" in out
    assert f"held-out bytes (1 of 12 files) from {texts}; windows of 8 bytes" in out
    assert "test bits per byte" in out and "tokens/s" in out
    sample = load(finished / "summary.json")["sample"]
    assert sample.startswith("\n") and f"A sample:\n{'-' * 80}\n{sample}\n{'-' * 80}\n" in out


def test_a_resumed_run_is_bit_identical(finished, program, texts, tmp_path, checksums):
    """From the checkpoint of step 10 on; with the command that a stopped run prints, and another prompt."""
    folder = shutil.copytree(finished, tmp_path / "again")
    shutil.rmtree(folder / "checkpoints" / "12")
    (folder / "summary.json").unlink()
    words = ["--K", "2", *QUICK, "--text", texts, "--workdir", folder]
    code, out, err = program(*words, "--resume", "--prompt=-2 times", "--temperature", 0)
    assert code == 0 and "Resuming after step 10" in out and "\n-2 times" in out, err
    assert checksums(folder) == checksums(finished)
    assert untimed(folder) == untimed(finished)


def test_another_text_is_refused(finished, refused, program, texts, tmp_path):
    changed = shutil.copytree(texts, tmp_path / "changed")
    words = ["--K", 2, *QUICK, "--workdir", finished, "--resume"]
    (changed / "03.txt").write_text("Changed.\n" * 50)
    code, _, err = program(*words, "--text", changed)
    assert code == 2 and "the text is another than it was (CRC32 " in err
    code, _, err = program(*words)
    assert code == 2 and "--dataset is python and was text" in err


def test_a_stopped_run_prints_how_to_go_on(program, texts, tmp_path, monkeypatch):
    advanced = Console.advanced

    def signal_once(self: Console, step: int) -> None:
        advanced(self, step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    quick = [word for word in QUICK if word not in ("--steps", "12")]
    with monkeypatch.context() as patch:
        patch.setattr(Console, "advanced", signal_once)
        code, out, _ = program("--K", 1, *quick, "--epochs", 1, "--text", texts, "--prompt=-x 'y'")
    assert code == 130
    again = shlex.split(out.strip().splitlines()[-1].removeprefix("  python -m fr_jax.experiments.lm "))
    assert str(texts) in again and "--resume" in again
    settings = parse("lm", lm.LM.defaults, again[3:] if again[0] == "python" else again)
    check(settings)
    assert (settings.epochs, settings.steps, settings.prompt, settings.text) == (1, None, "-x 'y'", (texts,))


def test_python_without_a_sample(program, tmp_path, monkeypatch):
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path / "cache"))
    quick = ["--K", 2, *QUICK, "--steps", 2, "--sample-bytes", 0]
    code, out, err = program(*quick, "--workdir", tmp_path / "run")
    assert code == 0 and "data: source code of Python's standard library" in out and "A sample" not in out, err
    assert "sample" not in load(tmp_path / "run" / "summary.json")


@pytest.mark.parametrize(
    ("arguments", "texts_of_the_message"),
    [
        (["--text", "/nonexistent"], ["--text /nonexistent does not exist", "UTF-8"]),
        (["--dataset", "cifar10"], ["no text 'cifar10'", "auto, python, text"]),
        (["--dataset", "text"], ["needs files: add --text"]),
        (["--data-dir", "x"], ["--data-dir x is for images", "--text"]),
        (["--width", "10", "--heads", "4"], ["width = 10", "4 heads", "multiple of 8"]),
        (["--context", "0"], ["--context 0", "at least 1"]),
        (["--positions", "sinus"], ["--positions sinus", "rotary, learned"]),
        (["--temperature", "-1"], ["--temperature -1.0", "at least 0"]),
        (["--K", "9"], ["--K 9", "6 layers"]),
        (["--method", "dni", "--label-conditioning"], ["--label-conditioning", "Drop the flag"]),
        (["--method", "blockprop", "--cache"], ["--cache", "Drop the flag"]),
    ],
)
def test_bad_arguments(refused, texts, arguments, texts_of_the_message):
    given = [] if {"--text", "--dataset"} & {*arguments} else ["--text", texts]
    line = refused(*QUICK, *given, *arguments)
    assert all(part in line for part in texts_of_the_message), line


def test_an_empty_prompt(refused, texts):
    assert "--prompt is empty" in refused(*QUICK, "--text", texts, "--prompt", "")


def test_texts_that_are_too_short(refused, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    line = refused(*QUICK, "--text", tmp_path / "a.txt", "--context", 50)
    assert "training text has 92 bytes" in line or "held-out text has 8 bytes" in line
    words = ["--text", tmp_path / "a.txt", "--context", 4, "--batch-size", 40]
    assert "--batch-size 40 is too large" in refused(*QUICK, *words)


def test_settings_of_text_are_refused_for_images(in_process):
    code, _, err = in_process(cifar.main, "--dataset", "digits", "--text", "a", "b")
    assert code == 2 and "--text a b is a setting of --model gpt, not of resnet20. Drop the flag." in err


def test_another_model(program, tmp_path):
    words = ["--model", "mlp", "--depth", 2, "--width", 8, "--K", 2, "--dataset", "digits", "--steps", 2]
    code, out, err = program(*words, "--workdir", tmp_path)
    assert code == 0 and "test accuracy" in out and "A sample" not in out, err


@pytest.mark.slow
def test_compare(in_process, texts, tmp_path):
    words = ["--dataset", "text", "--text", texts, "--model", "gpt", "--methods", "bp", "fr", "ddg", "--K", 2]
    quick = [word for word in QUICK if word != "--sample-bytes"][:-1]
    code, _, err = in_process(compare, *words, *quick, "--optimizer", "adamw", "--workdir", tmp_path)
    assert code == 0, err
    assert "bits per byte" in (tmp_path / "table.md").read_text()
    assert in_process(compare, *words, *quick, "--optimizer", "adamw", "--workdir", tmp_path)[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_resumed_is_bit_identical(finished, program, texts, tmp_path, program_env, checksums):
    folder = tmp_path / "run"
    words = ["--K", "2", *QUICK, "--text", str(texts), "--workdir", str(folder)]
    command = [sys.executable, "-m", "fr_jax.experiments.lm", *words]
    with subprocess.Popen(command, env=program_env, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 250
        while not (folder / "checkpoints" / "5").is_dir():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.kill()
    code, _, err = program(*words, "--resume")
    assert code == 0, err
    assert checksums(folder) == checksums(finished)
    assert untimed(folder) == untimed(finished)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(finished, texts, tmp_path, program_env, checksums):
    """The numbers and the sample of one process."""
    folder = tmp_path / "run"
    words = ["-m", "fr_jax.experiments.lm", "--K", "2", *QUICK, "--text", str(texts), "--workdir", str(folder)]
    command = [sys.executable, "-m", "fr_jax.launch", "--processes", "2", "--no-pin", "--", *words]
    done = subprocess.run(command, env=program_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load(folder / "summary.json")["sample"] == load(finished / "summary.json")["sample"]
    assert done.stdout.count("A sample:") == 1
    assert checksums(folder) == checksums(finished)
    assert untimed(folder) == untimed(finished)
