import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from fr_jax.distributed import _supervision, launch

if sys.platform == "win32":
    pytest.skip("needs POSIX processes", allow_module_level=True)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fr_jax.launch", *words]


@pytest.fixture
def begin(program_env):
    """Starts a command that is killed with the test, whatever its end."""
    begun = []

    def begin(words: list[str], **options) -> subprocess.Popen:
        begun.append(subprocess.Popen(words, env=program_env, stdout=subprocess.PIPE, text=True, **options))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def run(monkeypatch, capsys):
    """``main`` in this process: ``words -> (exit code, lines of stdout, lines of stderr)``."""

    def run(*words: str) -> tuple[int, list[str], list[str]]:
        code = launch.main(words)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_every_line_begins_with_its_process(run):
    program = "import os, sys; print('out', os.environ['FR_JAX_PROCESS_ID']); print('err', file=sys.stderr)"
    code, out, err = run("--processes", "2", "--no-pin", "--", "-c", program)
    assert (code, sorted(out), sorted(err)) == (0, ["[0] out 0", "[1] out 1"], ["[0] err", "[1] err"])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="pins on Linux only")
def test_cores_are_divided(run):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    _, out, _ = run("--processes", "2", "--", "-c", "import os; print(sorted(os.sched_getaffinity(0)))")
    share = len(cores) // 2
    assert sorted(out) == [f"[0] {cores[:share]}", f"[1] {cores[share : 2 * share]}"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="pins on Linux only")
@pytest.mark.parametrize(("given", "seen"), [(None, "2"), ("3", "3")])
def test_a_single_core_has_two_threads(run, monkeypatch, given, seen):
    """One that computes, and one that sends while it does."""
    monkeypatch.delenv("NPROC", raising=False)
    if given:
        monkeypatch.setenv("NPROC", given)
    cores = len(os.sched_getaffinity(0))
    _, out, _ = run("--processes", str(cores), "--", "-c", "import os; print(os.environ.get('NPROC'))")
    assert [line.split()[-1] for line in out] == [seen] * cores


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a variable of the GNU C library")
@pytest.mark.parametrize("given", [None, "glibc.malloc.hugetlb=0"])
def test_a_single_core_keeps_its_memory(run, monkeypatch, given):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    program = "import os; print(os.environ.get('GLIBC_TUNABLES'))"
    cores = len(os.sched_getaffinity(0))
    _, out, _ = run("--processes", str(cores), "--", "-c", program)
    assert [line.split()[-1] for line in out] == [given or launch.KEEP_MEMORY["GLIBC_TUNABLES"]] * cores
    _, out, _ = run("--processes", "1", "--no-pin", "--", "-c", program)
    assert out == [f"[0] {given}"]  # more cores, another allocator's trade


def test_all_end_when_one_fails(run, monkeypatch):
    monkeypatch.setattr(_supervision, "GRACE_SECONDS", 0.3)
    program = "import os, sys, time; sys.exit(5) if os.environ['FR_JAX_PROCESS_ID'] == '1' else time.sleep(50)"
    begin = time.monotonic()
    code, _, err = run("--processes", "2", "--no-pin", "--", "-c", program)
    assert code == 5
    assert time.monotonic() - begin < 40
    assert err == ["fr_jax: process 0 did not end by itself, and is killed."]


def test_a_signal_that_ended_one_is_named(run):
    program = "import os, time; os.environ['FR_JAX_PROCESS_ID'] == '1' and os.kill(os.getpid(), 9)"
    code, _, err = run("--processes", "2", "--no-pin", "--", "-c", program)
    assert code == 137
    assert "fr_jax: process 1 was ended by SIGKILL; the others cannot continue." in err
    assert err[-1].startswith("fr_jax: ended because process 1 was ended by SIGKILL. A training program")


STOPS_WHEN_TOLD = (
    # A handler beside time.sleep would miss a signal that comes just before the sleep.
    "import os, signal, sys, time; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
    "print('ready', flush=True); signal.sigwait([signal.SIGTERM]); "
)


def test_signals_reach_all(begin):
    words = command("--processes", "2", "--no-pin", "--", "-c", STOPS_WHEN_TOLD + "print('stopped'); sys.exit(143)")
    group = begin(words, stderr=subprocess.PIPE)
    assert sorted(group.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    group.send_signal(signal.SIGTERM)
    out, err = group.communicate(timeout=60)
    assert sorted(out.splitlines()) == ["[0] stopped", "[1] stopped"]
    assert (group.returncode, err) == (143, "")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_the_group_ends_with_a_launcher_that_was_killed(begin):
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(50)"
    words = command("--processes", "2", "--no-pin", "--", "-c", program)
    group = begin(words)
    pids = [int(group.stdout.readline()[4:]) for _ in range(2)]
    group.kill()
    group.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0", "--", "x.py"], "--processes 0 is out of range"),
        (["--processes", "100000", "--", "x.py"], "--processes 100000 needs one core per process"),
        (["--processes", "2"], "the program is missing"),
    ],
)
def test_bad_arguments(words, message, capsys):
    try:
        code = launch.main(words)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_gpus_are_divided(monkeypatch):
    assert [launch.share_of(i, 2, range(4)) for i in range(2)] == [[0, 1], [2, 3]]
    assert launch.share_of(0, 4, range(2)) == []
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert launch.count_gpus() == 2
    with pytest.raises(launch.LaunchError, match="--processes 3 needs one GPU per process, and there are 2"):
        launch.start(["x.py"], 3, pin=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert launch.count_gpus() == 0
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch.count_gpus() == 0
