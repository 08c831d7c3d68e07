import json
import socket
import sys

import pytest

from fr_jax import distributed
from fr_jax.distributed import Group, GroupError
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
