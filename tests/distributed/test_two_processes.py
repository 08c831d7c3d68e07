"""Two processes, on one host and on two: they move arrays, and neither hangs when the other is lost."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from fr_jax.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port

SCRIPT = str(Path(__file__).with_name("two_processes.py"))
VALUES = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
ONE_MORE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]

if sys.platform == "win32":
    pytest.skip("needs POSIX processes", allow_module_level=True)


@pytest.fixture
def pair(program_env, tmp_path):
    """Starts the two processes, checks what they printed, and returns them; killed with the test."""
    started = []

    def pair(prefixes=((), ()), host="127.0.0.1") -> list[subprocess.Popen]:
        group = {COORDINATOR: f"{host}:{free_port()}", NUM_PROCESSES: "2"}
        for i, prefix in enumerate(prefixes):
            env = program_env | group | {PROCESS_ID: str(i)}
            with open(tmp_path / f"err{i}", "w") as err:
                words = [*prefix, sys.executable, SCRIPT]
                started.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=err, text=True))
        lines = [process.stdout.readline() for process in started]
        assert all(lines), [(tmp_path / f"err{i}").read_text()[-2000:] for i in range(2)]
        first, second = map(json.loads, lines)
        assert (first["placed"], second["placed"]) == (VALUES, None)
        assert (first["put"], second["put"]) == (None, VALUES)
        assert (first["key"], second["key"]) == (None, jax.random.key_data(jax.random.key(7)).tolist())
        assert (first["to_first"], second["to_first"]) == ({"x": VALUES, "y": ONE_MORE}, {})
        assert (first["from_first"], second["from_first"]) == (None, ONE_MORE)
        assert first["read"] == {"x": VALUES, "y": VALUES, "here": 0}
        assert second["read"] == {"x": VALUES, "y": VALUES, "here": 1}
        assert first["shown"] == second["shown"] == "15.0000"
        return started

    yield pair
    for process in started:
        process.kill()
        process.communicate()


def assert_ends(process: subprocess.Popen, err: Path, seconds: float) -> None:
    begin = time.monotonic()
    assert process.wait(timeout=100) != 0
    assert time.monotonic() - begin < seconds
    text = err.read_text()
    assert "another task died" in text or "can no longer be reached" in text or "Terminating process" in text, text


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other(pair, tmp_path, victim):
    group = pair()
    group[victim].kill()
    assert_ends(group[1 - victim], tmp_path / f"err{1 - victim}", 30)  # 5 s, on a loaded machine


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


def test_two_hosts_and_a_cable_that_is_cut(pair, hosts, tmp_path):
    group = pair(hosts, "10.97.0.1")
    subprocess.run([*hosts[1], "ip", "link", "set", "veth0", "down"], check=True)
    for i, process in enumerate(group):
        assert_ends(process, tmp_path / f"err{i}", 60)
