"""The training program across processes: the numbers of one process, and an end without a hang when one is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fr_jax.distributed import free_port
from fr_jax.training.checkpoints import Checkpoints

PROGRAM = ["-m", "fr_jax.experiments.cifar", "--K", "4", "--dataset", "synthetic", "--model", "mlp"]
SMALL = ["--width", "16", "--batch-size", "8", "--eval-every", "1000", "--log-every", "2", "--milestones", "0.001"]
LAUNCH = ["-m", "fr_jax.launch", "--processes", "2", "--no-pin", "--"]


@pytest.fixture
def run(quick_env):
    def run(*words: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=quick_env, capture_output=True, text=True, timeout=200)

    return run


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_s")} for line in lines]


def checksums(folder: Path) -> dict:
    """What the newest checkpoint says of each leaf of the state: dtype, shape, and a checksum of its bytes."""
    import orbax.checkpoint as ocp

    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints._read(checkpoints.steps()[-1], index=ocp.args.JsonRestore()).index["leaves"]


@pytest.fixture(scope="module")
def alone(quick_env, tmp_path_factory):
    """The folder of six steps in one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    command = [sys.executable, *PROGRAM, *SMALL, "--steps", "6", "--workdir", str(folder)]
    done = subprocess.run(command, env=quick_env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.timeout(600)
def test_two_processes_train_to_the_bits_of_one_and_resume(run, alone, tmp_path):
    group = tmp_path / "group"
    first = run(*LAUNCH, *PROGRAM, *SMALL, "--steps", 3, "--workdir", group)
    assert first.returncode == 0, first.stderr
    assert not any(line.startswith("[1]") for line in first.stdout.splitlines())
    assert "cpu:2049" in first.stdout  # stages on both processes' devices, neighbours together
    second = run(*PROGRAM, *SMALL, "--steps", 5, "--workdir", group, "--resume")
    assert second.returncode == 0, second.stderr
    third = run(*LAUNCH, *PROGRAM, *SMALL, "--steps", 6, "--workdir", group, "--resume")
    assert third.returncode == 0, third.stderr
    assert "Resuming after step 5 of 6" in third.stdout
    assert checksums(group) == checksums(alone)
    assert rows(group)[-1] == rows(alone)[-1]  # the test row
    assert json.loads((group / "summary.json").read_text())["device"] == "4 x cpu"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_finished_run_is_refused_by_all(run, tmp_path):
    words = [*LAUNCH, *PROGRAM, *SMALL, "--steps", 1, "--workdir", tmp_path / "run"]
    first, again = run(*words), run(*words)
    assert (first.returncode, again.returncode) == (0, 2), first.stderr + again.stderr
    assert "holds a finished run" in again.stderr


@pytest.fixture
def pair(quick_env, tmp_path):
    """``(words, words) -> [process 0, process 1]``, started by hand on this machine; killed at the end."""
    started = []

    def start(*each: list[object], prefixes: tuple = ((), ()), host: str = "127.0.0.1") -> list[subprocess.Popen]:
        port = free_port()
        for i, (words, prefix) in enumerate(zip(each, prefixes, strict=True)):
            group = ["--coordinator", f"{host}:{port}", "--num-processes", "2", "--process-id", str(i)]
            command = [*prefix, sys.executable, *map(str, [*PROGRAM, *SMALL, *words]), *group]
            with open(tmp_path / f"log{i}", "w") as log:
                started.append(subprocess.Popen(command, env=quick_env, stdout=log, stderr=subprocess.STDOUT))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(path: Path, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} never came in {path}"
        time.sleep(0.1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other(pair, tmp_path, victim):
    words = ["--steps", 10**6, "--heartbeat", 5, "--workdir", tmp_path / "run"]
    group = pair(words, words[:-2])  # only process 0 needs the folder
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 4')
    group[victim].kill()
    killed = time.monotonic()
    code = group[1 - victim].wait(timeout=60)
    assert time.monotonic() - killed < 30  # 5 s, on a loaded machine
    assert code not in (0, None)
    said = (tmp_path / f"log{1 - victim}").read_text()
    assert "another task died" in said or "can no longer be reached" in said, said
    assert "ends the others within 5 s" in (tmp_path / "log0").read_text()


@pytest.mark.timeout(300)
def test_ctrl_c_stops_all_after_the_same_step_and_saves(quick_env, run, tmp_path):
    words = [sys.executable, *LAUNCH, *PROGRAM, *SMALL, "--steps", str(10**6), "--workdir", str(tmp_path / "run")]
    group = subprocess.Popen(words, env=quick_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 4')
    group.send_signal(signal.SIGINT)
    out, err = group.communicate(timeout=100)
    assert group.returncode == 130, err
    assert "everything is saved. Continue with" in out
    assert "python -m fr_jax.launch --processes 2 --no-pin -- -m fr_jax.experiments.cifar" in out
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps()


@pytest.mark.timeout(300)
def test_processes_must_be_alike(pair, tmp_path):
    words = ["--steps", 2, "--workdir", tmp_path / "run"]
    group = pair([*words, "--seed", 0], [*words, "--seed", 1])
    assert [process.wait(timeout=120) for process in group] == [2, 2]
    assert "another setting than process 0: seed is 1, not 0" in (tmp_path / "log0").read_text()
    assert not (tmp_path / "run").exists()


def test_more_processes_than_stages(run, tmp_path):
    done = run(*LAUNCH, *PROGRAM, *SMALL, "--steps", 2, "--K", 1, "--workdir", tmp_path / "run")
    assert done.returncode == 2
    assert "2 processes are too many for --K 1" in done.stderr


def test_compare_is_for_one_process(run):
    done = run(*LAUNCH, "-m", "fr_jax.experiments.compare")
    assert done.returncode == 2
    assert "one run after another in one process" in done.stderr


@pytest.fixture
def hosts():
    """Two network namespaces joined by a veth pair, as prefixes of commands; they see each other and nothing else."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs ip(8) and root")
    names = [f"frjax{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("network namespaces are not allowed here")
        assert ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for i, name in enumerate(names, start=1):
            assert ip("-n", name, "addr", "add", f"10.97.0.{i}/24", "dev", "veth0")
            assert ip("-n", name, "link", "set", "veth0", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.timeout(300)
def test_two_hosts(pair, alone, hosts, tmp_path):
    words = ["--steps", 6, "--workdir", tmp_path / "run"]
    group = pair(words, words, prefixes=hosts, host="10.97.0.1")
    codes = [process.wait(timeout=120) for process in group]
    assert codes == [0, 0], [(tmp_path / f"log{i}").read_text()[-2000:] for i in range(2)]
    assert checksums(tmp_path / "run") == checksums(alone)


@pytest.mark.timeout(300)
def test_a_host_that_cannot_be_reached(pair, hosts, tmp_path):
    words = ["--steps", 10**6, "--heartbeat", 5, "--workdir", tmp_path / "run"]
    group = pair(words, words, prefixes=hosts, host="10.97.0.1")
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 4')
    subprocess.run([*hosts[1], "ip", "link", "set", "veth0", "down"], check=True)
    cut = time.monotonic()
    for process in group:
        assert process.wait(timeout=100) != 0
    assert time.monotonic() - cut < 60
    for i in range(2):
        said = (tmp_path / f"log{i}").read_text()
        assert "Terminating process" in said or "can no longer be reached" in said, said
