"""Oracle 7 across processes: stages spread over two processes give the bits of one process."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("two_processes.py"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(env: dict[str, str], *arguments: object) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def numbers(process: subprocess.Popen) -> dict[str, dict]:
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.timeout(900)  # on a loaded machine
def test_two_processes_give_the_bits_of_one(program_env: dict[str, str]) -> None:
    alone = numbers(start(program_env))
    coordinator, *transfer = free_ports(3)
    group = [start(program_env, k, f"127.0.0.1:{coordinator}", transfer[k]) for k in range(2)]
    first, second = (numbers(process) for process in group)
    assert set(alone) == {"fr", "bp", "ddg", "dni", "blockprop", "gpipe"}
    for method in alone:
        assert set(first[method]) == {"params 0", "params 2"}
        assert set(second[method]) == {"params 1", "params 3", "loss"}
        assert first[method] | second[method] == alone[method]
