import json
import socket
import sys
import threading
import time

import jax
import pytest

from fr_jax import distributed
from fr_jax.distributed import Group, GroupError, _coordination, _joining
from fr_jax.distributed.launch import start


def test_an_ordinary_process_is_a_group_of_one():
    assert not distributed.initialize()
    assert distributed.is_first()
    group = distributed.group()
    assert (group.index, group.size) == (0, 1)
    assert group.exchange({"a": 1}) == [{"a": 1}]
    assert group.from_first(lambda: 3) == 3
    assert group.first_goes_first(lambda: 4) == 4
    group.check_same("setting", {"K": 2})
    group.fail(1)  # nobody to tell


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1234"}, "--num-processes, --process-id is missing"),
        ({"coordinator": "localhost", "num_processes": 2, "process_id": 0}, "localhost is not HOST:PORT"),
        ({"coordinator": "localhost:0", "num_processes": 2, "process_id": 0}, "localhost:0 .* port of 1 to 65535"),
        ({"coordinator": "localhost:99999", "num_processes": 2, "process_id": 1}, "99999 .* port of 1 to 65535"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "--process-id 2 .* can be 0 to 1"),
        ({"coordinator": "no.such.host.invalid:1", "num_processes": 2, "process_id": 0}, "no way to the coordinator"),
    ],
)
def test_what_cannot_be_a_group_is_said(given, message):
    with pytest.raises(GroupError, match=message) as caught:
        distributed.initialize(**given)
    assert caught.value.exit_code == 2


def test_a_port_in_use_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(GroupError, match=rf"cannot listen at {coordinator} \(Address already in use") as caught:
            distributed.initialize(coordinator, 2, 0)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("process_id", "message"),
    [
        (0, r"^process 1 of 2 did not come to 127.0.0.1:\d+ within 0.5 s\. Check"),
        (1, r"^process 1 of 2 could not join .* 127.0.0.1:\d+ within 0.5 s \(.*refused\)\. Check that process 0"),
    ],
)
def test_one_that_stays_alone_says_so(process_id, message):
    """JAX would abort it."""
    with pytest.raises(GroupError, match=message) as caught:
        distributed.initialize(f"127.0.0.1:{distributed.free_port()}", 2, process_id, join_seconds=0.5)
    assert caught.value.exit_code == 2


def test_numbers_in_the_environment_must_be_numbers(monkeypatch):
    monkeypatch.setenv(distributed.NUM_PROCESSES, "two")
    with pytest.raises(GroupError, match=r"FR_JAX_NUM_PROCESSES .* whole numbers"):
        distributed.initialize()


def test_no_cluster_is_said(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NODELIST", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(GroupError, match="no SLURM, Open MPI or Kubernetes was found"):
        distributed.initialize(detect=True, join_seconds=5)


def test_values_that_differ_are_named():
    group = Group()
    group.exchange = lambda value: [{"K": 2, "seed": 0}, {"K": 3, "seed": 0}]
    with pytest.raises(GroupError, match="process 1 has another setting than process 0: K is 3, not 2") as caught:
        group.check_same("setting", {})
    assert not caught.value.reported


class Store:
    """A key-value store in which only this process has set anything."""

    def __init__(self):
        self.kept = {}

    def key_value_set(self, key, value):
        self.kept[key] = value

    def key_value_try_get(self, key):
        if key not in self.kept:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.kept[key]

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.kept:
            time.sleep(0.02)
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.kept[key]


@pytest.fixture
def alone(monkeypatch):
    """Process 0 of three, with a store in which process 1 has come to meeting 0; a minute takes 0.1 s."""
    store = Store()
    store.key_value_set("fr_jax/0/1", "null")
    monkeypatch.setattr(_coordination, "client", lambda: store)
    monkeypatch.setattr(_coordination, "REMIND_SECONDS", 0.1)
    monkeypatch.setattr(_coordination, "POLL_MILLISECONDS", 20)
    return Group(0, 3)


def test_who_does_not_come_is_named_again_and_again_until_patience_ends(alone, capsys):
    alone.patience = 0.35
    with pytest.raises(
        GroupError, match=r"process 2, alive .* not come to meeting 0, in test_who_\w+ .*line \d+\) within 0 s"
    ):
        alone.exchange(None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("fr_jax: process 0 waits: after 0 s process 2, alive but busy or stuck, has not come to")


def test_what_process_0_does_alone_is_waited_for(alone, capsys):
    alone.patience = 0.01
    store = _coordination.client()
    threading.Timer(0.25, store.key_value_set, ("fr_jax/0/2", "null")).start()
    assert alone.first_goes_first(lambda: time.sleep(0.05)) is None
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_process_that_does_not_go_on_says_where_it_is(alone, capsys, monkeypatch):
    ended = []
    monkeypatch.setattr(_coordination.os, "_exit", lambda code: ended.append(code) or setattr(alone, "patience", 9))
    alone.patience = 0.35
    with alone.watched():
        for _ in range(10):
            alone.sign()
            time.sleep(0.02)
        assert capsys.readouterr().err == ""
        time.sleep(0.6)
    lines = capsys.readouterr().err.splitlines()
    assert all(" process 0 has been in test_a_process_that_does_not_go_on" in line for line in lines[:3])
    assert "did not go on for 0 s, and is ended" in lines[3] and ended == [1]
    assert _coordination.client().kept["fr_jax/failed"] == "[0, 1]"


def test_collectives_of_cpus_listen_where_the_others_look(monkeypatch):
    """JAX takes the address of the machine's own name, which is 127.0.0.1 on many: a stage on two of them failed."""
    given = []
    make = lambda **how: given.append(how["hostname"]) or "gloo"
    monkeypatch.setattr(jax._src.lib._jax, "make_gloo_tcp_collectives", make)
    monkeypatch.setattr(jax._src.xla_bridge, "make_cpu_client", lambda collectives: given.append(collectives))
    _joining._cpu_client("10.0.0.2")
    assert given == ["10.0.0.2", "gloo"]


SCRIPT = """
import json, time
from fr_jax import distributed
distributed.initialize(heartbeat_seconds=10)
group = distributed.group()
report = [group.exchange({"index": group.index}), group.from_first(lambda: [group.index]), distributed.is_first()]
if group.index == 1:
    report.append(group.fail(7))
else:
    try:
        group.exchange(None)
    except distributed.GroupError as error:
        report += [str(error), error.exit_code, error.reported, group.fail(7)]
print(json.dumps(report), flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_two_processes(tmp_path, program_env, monkeypatch):
    """They exchange values, one that gives up stops the other, and SIGTERM ends both: JAX would only record it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", program_env["PYTHONPATH"])
    group = start([str(script)], 2, pin=False)
    try:
        first, second = (json.loads(process.stdout.readline()) for process in group)
        indices = [{"index": 0}, {"index": 1}]
        assert first == [indices, [0], True, "process 1 failed; see its output.", 7, True, False]
        assert second == [indices, [0], False, True]
        for process in group:
            process.terminate()
        assert [process.wait(60) for process in group] == [-15, -15]
    finally:
        for process in group:
            process.kill()
            process.communicate()
