import os
import signal
import subprocess
import sys
import time

import pytest

from fr_jax.distributed import launch

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
def run(program_env):
    def run(*words: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(command(*words), env=program_env, capture_output=True, text=True, timeout=60, **options)

    return run


def test_every_line_says_whose_it_is(run):
    done = run(
        *("--processes", "2", "--no-pin", "--", "-c"),
        "import os, sys; print('out', os.environ['FR_JAX_PROCESS_ID']); print('err', file=sys.stderr)",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert sorted(done.stderr.splitlines()) == ["[0] err", "[1] err"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="pins on Linux only")
def test_cores_are_shared_out(run):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    done = run("--processes", "2", "--", "-c", "import os; print(sorted(os.sched_getaffinity(0)))")
    share = len(cores) // 2
    assert sorted(done.stdout.splitlines()) == [f"[0] {cores[:share]}", f"[1] {cores[share : 2 * share]}"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="pins on Linux only")
def test_a_single_core_has_two_threads(program_env):
    """One that computes, and one that sends while it does."""
    cores = sorted(os.sched_getaffinity(0))
    ask = command("--processes", str(len(cores)), "--", "-c", "import os; print(os.environ.get('NPROC'))")
    env = {name: value for name, value in program_env.items() if name != "NPROC"}
    done = subprocess.run(ask, env=env, capture_output=True, text=True, timeout=60)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["2"] * len(cores)
    done = subprocess.run(ask, env=env | {"NPROC": "3"}, capture_output=True, text=True, timeout=60)
    assert {line.split()[-1] for line in done.stdout.splitlines()} == {"3"}


def test_all_end_when_one_fails(run):
    start = time.monotonic()
    done = run(
        *("--processes", "2", "--no-pin", "--", "-c"),
        "import os, sys, time; sys.exit(5) if os.environ['FR_JAX_PROCESS_ID'] == '1' else time.sleep(50)",
    )
    assert done.returncode == 5
    assert time.monotonic() - start < 40
    assert "process 0 did not end by itself, and is killed" in done.stderr


def test_a_signal_that_ended_one_is_named(run):
    done = run(
        *("--processes", "2", "--no-pin", "--", "-c"),
        "import os, time; os.environ['FR_JAX_PROCESS_ID'] == '1' and os.kill(os.getpid(), 9)",
    )
    assert done.returncode == 137
    assert "process 1 was ended by SIGKILL; the others cannot go on" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fr_jax: ended because process 1 was ended by SIGKILL. A training")


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


@pytest.mark.parametrize(("limit", "deaf"), [("STOP_SECONDS", "1"), ("SIGNAL_SECONDS", "0, 1")])
def test_those_that_do_not_stop_are_killed(begin, limit, deaf):
    stops = STOPS_WHEN_TOLD + f"os.environ['FR_JAX_PROCESS_ID'] in '{deaf}' and time.sleep(100); sys.exit(143)"
    hurried = f"import sys; from fr_jax.distributed import _supervision, launch; _supervision.{limit} = 0.5; "
    words = [sys.executable, "-c", hurried + "sys.exit(launch.main(sys.argv[1:]))"]
    group = begin([*words, "--processes", "2", "--no-pin", "--", "-c", stops], stderr=subprocess.PIPE)
    assert sorted(group.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    group.send_signal(signal.SIGTERM)
    _, err = group.communicate(timeout=60)
    assert (group.returncode, err) == (143, f"fr_jax: process {deaf} did not end by itself, and is killed.\n")


def test_a_signal_ends_processes_that_have_joined(begin):
    """JAX would only make a note of SIGTERM, and a launcher that is killed would leave its group running."""
    program = "import time; from fr_jax import distributed; distributed.initialize(); print('in', flush=True); "
    words = command("--processes", "2", "--no-pin", "--", "-c", program + "time.sleep(100)")
    group = begin(words)
    assert sorted(group.stdout.readline() for _ in range(2)) == ["[0] in\n", "[1] in\n"]
    group.send_signal(signal.SIGTERM)
    group.communicate(timeout=60)
    assert group.returncode == 143


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
        (["--processes", "100000", "--", "x.py"], "--processes 100000 need a core each"),
        (["--processes", "2"], "what to start is missing"),
    ],
)
def test_bad_arguments(words, message, capsys):
    try:
        code = launch.main(words)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_gpus_are_shared_out(monkeypatch):
    assert [launch.gpus_of(i, 2, 4) for i in range(2)] == ["0,1", "2,3"]
    assert launch.gpus_of(0, 4, 2) is None
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert launch.count_gpus() == 2
    with pytest.raises(launch.LaunchError, match="--processes 3 need a GPU each, and there are 2"):
        launch.start(["x.py"], 3, pin=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert launch.count_gpus() == 0
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch.count_gpus() == 0
