"""The training program across processes: the numbers of one process, and an end without a hang when one is lost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fr_jax import distributed
from fr_jax.distributed import free_port, launch
from fr_jax.distributed.launch import wait
from fr_jax.experiments import cifar
from fr_jax.experiments.compare import __main__ as compare
from fr_jax.training.checkpoints import Checkpoints

PROGRAM = ["-m", "fr_jax.experiments.cifar", "--K", "4", "--dataset", "synthetic", "--model", "mlp"]
SMALL = ["--width", "16", "--batch-size", "8", "--eval-every", "1000", "--log-every", "2", "--milestones", "0.001"]
LAUNCH = ["-m", "fr_jax.launch", "--processes", "2", "--no-pin", "--"]


@pytest.fixture
def run(program_env):
    def run(*words: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=program_env, capture_output=True, text=True, timeout=200)

    return run


@pytest.fixture
def start(program_env, monkeypatch):
    """Starts the program as two processes; killed with the test."""
    started = []
    for name, value in program_env.items():
        monkeypatch.setenv(name, value)

    def start(*words: object) -> list[subprocess.Popen]:
        group = launch.start([*PROGRAM, *SMALL, *map(str, words)], 2, pin=False)
        started.extend(group)
        return group

    yield start
    for process in started:
        process.kill()
        process.wait()


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_s")} for line in lines]


def here(*words: object) -> int:
    """The program in the test's own process."""
    return cifar.main([*PROGRAM[2:], *SMALL, *map(str, words)])


def wait_for(path: Path, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} never came in {path}"
        time.sleep(0.1)


@pytest.mark.slow  # quick: two processes give the bits of one (algorithms/), a group ends together (distributed/)
@pytest.mark.timeout(600)
def test_a_stopped_group_is_continued_to_the_bits_of_one_process(start, tmp_path, capfd, checksums):
    """Ctrl-C stops all after the same step and saves; one process goes on, then the group, as one process alone."""
    folder, alone = tmp_path / "group", tmp_path / "alone"
    group = start("--steps", 10**6, "--workdir", folder)
    wait_for(folder / "metrics.jsonl", '"step": 4')
    for process in group:
        process.send_signal(signal.SIGINT)
    assert wait(group) == 130
    out = capfd.readouterr().out
    assert not any(line.startswith("[1]") for line in out.splitlines())
    assert "ends the others after about 60 s" in out
    assert "cpu:2049" in out  # stages on both processes' devices, neighbours together
    assert "everything is saved. Continue with" in out
    assert "python -m fr_jax.launch --processes 2 --no-pin -- -m fr_jax.experiments.cifar" in out
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.steps()[-1]
    assert here("--steps", step + 2, "--workdir", folder, "--resume") == 0
    assert wait(start("--steps", step + 3, "--workdir", folder, "--resume")) == 0
    assert f"Resuming after step {step + 2:,} of {step + 3:,}" in capfd.readouterr().out
    assert here("--steps", step + 3, "--workdir", alone) == 0
    assert checksums(folder) == checksums(alone)
    assert rows(folder)[-1] == rows(alone)[-1]  # the test row
    assert json.loads((folder / "summary.json").read_text())["device"] == "4 x cpu"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["fr", "2bw"])
def test_micro_batches_on_two_processes_give_the_bits_of_one(start, tmp_path, method, checksums):
    words = ["--method", method, "--microbatches", 4, "--steps", 6]
    assert wait(start(*words, "--workdir", tmp_path / "group")) == 0
    assert here(*words, "--workdir", tmp_path / "alone") == 0
    assert checksums(tmp_path / "group") == checksums(tmp_path / "alone")
    assert [row.get("train_loss") for row in rows(tmp_path / "group")] == [
        row.get("train_loss") for row in rows(tmp_path / "alone")
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_init_from_a_run_of_another_K_on_two_processes_gives_the_bits_of_one(run, tmp_path, checksums):
    """Weights, momentum and step come along from one process to two, and from a run of two to one."""
    program = ["-m", "fr_jax.experiments.mnist", "--dataset", "digits", "--depth", "4", "--width", "16"]
    program += ["--batch-size", "32", "--log-every", "1", "--test-examples", "64", "--milestones", "0.5"]

    def train(folder: str, K: int, steps: int, *more: object, launched: bool) -> str:
        words = [*program, "--K", K, "--steps", steps, "--workdir", tmp_path / folder, *more]
        ended = run(*(LAUNCH if launched else ()), *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    train("first", 2, 12, launched=False)
    printed = train("group", 4, 20, "--init-from", tmp_path / "first", launched=True)
    line = f"Going on from step 12 of {tmp_path / 'first'} (K = 2): weights, statistics and optimizer state"
    assert printed.count(line) == 1  # process 0 alone says so
    train("alone", 4, 20, "--init-from", tmp_path / "first", launched=False)
    assert checksums(tmp_path / "group") == checksums(tmp_path / "alone")
    assert rows(tmp_path / "group") == rows(tmp_path / "alone")
    # Three stages: the second lies elsewhere than in the run of four. Another optimizer: only weights come along.
    words = ["--optimizer", "adamw", "--init-from", tmp_path / "group"]
    assert "weights and statistics (another optimizer)" in train("back", 3, 24, *words, launched=True)
    train("back_alone", 3, 24, *words, launched=False)
    assert checksums(tmp_path / "back") == checksums(tmp_path / "back_alone")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_finished_run_is_refused_by_all(run, tmp_path):
    words = [*LAUNCH, *PROGRAM, *SMALL, "--steps", 1, "--workdir", tmp_path / "run"]
    first, again = run(*words), run(*words)
    assert (first.returncode, again.returncode) == (0, 2), first.stderr + again.stderr
    assert "holds a finished run" in again.stderr


@pytest.fixture
def pair(program_env, tmp_path):
    """``(words, words) -> [process 0, process 1]``, started by hand on this machine; killed at the end."""
    started = []

    def start(*each: list[object]) -> list[subprocess.Popen]:
        port = free_port()
        for i, words in enumerate(each):
            group = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(i)]
            command = [sys.executable, *map(str, [*PROGRAM, *SMALL, *words]), *group]
            with open(tmp_path / f"log{i}", "w") as log:
                started.append(subprocess.Popen(command, env=program_env, stdout=log, stderr=subprocess.STDOUT))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow  # of two processes without a program: tests/distributed/test_two_processes.py
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(pair, tmp_path, victim):
    words = ["--steps", 10**6, "--heartbeat", 5, "--workdir", tmp_path / "run"]
    group = pair(words, words[:-2])  # only process 0 needs the folder
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 4')
    group[victim].kill()
    killed = time.monotonic()
    code = group[1 - victim].wait(timeout=60)
    assert time.monotonic() - killed < 30  # 5 s, on a loaded machine
    assert code not in (0, None)
    printed = (tmp_path / f"log{1 - victim}").read_text()
    assert "another task died" in printed or "can no longer be reached" in printed, printed
    assert "ends the others after about 5 s" in (tmp_path / "log0").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_must_be_alike(pair, tmp_path):
    words = ["--steps", 2, "--workdir", tmp_path / "run"]
    group = pair([*words, "--seed", 0], [*words, "--seed", 1])
    assert [process.wait(timeout=120) for process in group] == [2, 2]
    assert "another setting than process 0: seed is 1, not 0" in (tmp_path / "log0").read_text()
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pretend(monkeypatch):
    """Makes this process believe that it is process 0 of two; the other one says ``change`` of what it is told."""

    def pretend(change):
        group = distributed.Group(0, 2)
        group.exchange = lambda value: [value, change(value)]
        monkeypatch.setattr(distributed, "initialize", lambda *_, **__: True)
        monkeypatch.setattr(distributed, "group", lambda: group)

    return pretend


def test_another_setting_is_named(pretend, tmp_path, capsys):
    pretend(lambda settings: settings | {"seed": 1})
    assert cifar.main(["--dataset", "synthetic", "--K", "2", "--workdir", str(tmp_path / "run")]) == 2
    assert "process 1 has another setting than process 0: seed is 1, not 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_processes_than_stages(pretend, capsys):
    pretend(lambda value: value)
    assert cifar.main(["--dataset", "synthetic", "--K", "1"]) == 2
    assert "2 processes are too many for --K 1" in capsys.readouterr().err


def test_compare_is_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv(distributed.NUM_PROCESSES, "2")
    assert compare.main([]) == 2
    assert "one run after another in one process" in capsys.readouterr().err
