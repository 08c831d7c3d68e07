"""Oracle 7 across processes: stages spread over two processes give the bits of one process."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fr_jax.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port

SCRIPT = str(Path(__file__).with_name("two_processes.py"))


def start(methods: list[str], env: dict[str, str], **group: str) -> subprocess.Popen:
    words = [sys.executable, SCRIPT, *methods]
    return subprocess.Popen(words, env=env | group, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def numbers(process: subprocess.Popen) -> dict[str, dict]:
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.timeout(900)  # on a loaded machine
@pytest.mark.parametrize(
    "methods",
    [
        ["fr-M"],
        pytest.param(["gpipe", "bp", "ddg", "dfa", "dni", "blockprop", "proxprop", "mac"], marks=pytest.mark.slow),
        pytest.param(["bp-clipped", "fr-clipped", "fr-penalised"], marks=pytest.mark.slow),
        pytest.param(["1f1b", "fr-corrected", "fr-stashed", "ddg-M", "bp-M", "2bw"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_give_the_bits_of_one(methods: list[str], program_env: dict[str, str]) -> None:
    both = {COORDINATOR: f"127.0.0.1:{free_port()}", NUM_PROCESSES: "2"}
    group = [start(methods, program_env, **both, **{PROCESS_ID: str(k)}) for k in range(2)]
    try:
        here = runpy.run_path(SCRIPT)
        alone = {method: here["run"](here["METHODS"][method]) for method in methods}
        first, second = (numbers(process) for process in group)
    finally:
        for process in group:
            process.kill()
    for method in methods:
        assert set(first[method]) == {"params 0", "params 2"}
        assert set(second[method]) == {"params 1", "params 3", "loss"}
        assert first[method] | second[method] == alone[method]
