"""Checkpoints that are damaged, and disks that are full, in many ways: the one before is used, nothing is lost.

Few of each in the slow tests; ``FR_JAX_FLIPS=100 pytest -m slow -s tests/campaigns/test_damage.py`` for a campaign,
with a line of numbers for each test. ``FR_JAX_SEED`` draws other ones.
"""

import collections
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fr_jax.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port
from fr_jax.training.checkpoints import CheckpointError, Checkpoints

FLIPS, SEED = int(os.environ.get("FR_JAX_FLIPS", "3")), int(os.environ.get("FR_JAX_SEED", "0"))
SCRIPT = Path(__file__).parents[1] / "training" / "shards_script.py"
FOREIGN = re.compile(r"Traceback|\.py\b|\n")
"""What a line for a user does not have."""

pytestmark = pytest.mark.slow


def by_one_process(folder: Path, env: dict[str, str]) -> None:
    with Checkpoints(folder) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, values(step), {"n": step})


def by_two_processes(folder: Path, env: dict[str, str]) -> None:
    group = {COORDINATOR: f"127.0.0.1:{free_port()}", NUM_PROCESSES: "2"}
    command = [sys.executable, SCRIPT, folder, "save"]
    started = [subprocess.Popen(command, env=env | group | {PROCESS_ID: str(i)}) for i in range(2)]
    assert [process.wait(300) for process in started] == [0, 0]


def values(n: int) -> dict[str, Any]:
    """What shards_script.py saves, in one process."""
    a, b = n + np.arange(32, dtype=np.float32).reshape(8, 4), np.float32(n) * np.arange(6, dtype=np.float32)
    return {"a": jnp.asarray(a), "b": jnp.asarray(b), "key": jax.random.key(n), "n": n}


def step_of(state: dict[str, Any]) -> int | None:
    """Whose values these are, bit for bit; None for nobody's."""
    same = lambda x, y: np.array_equal(*map(jax.random.key_data, (x, y)) if "key" in str(y.dtype) else (x, y))
    n = state["n"]
    return n if all(same(state[name], like) for name, like in values(n).items() if name != "n") else None


def flips(data: bytes, rng: random.Random) -> Iterator[bytes]:
    for _ in range(FLIPS):
        changed, at = bytearray(data), rng.randrange(len(data))
        changed[at] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def cuts(data: bytes, rng: random.Random) -> Iterator[bytes]:
    yield b""
    for _ in range(max(2, FLIPS // 10)):
        yield data[: rng.randrange(len(data))]


DAMAGES: dict[str, Callable[[bytes, random.Random], Iterator[bytes | None]]] = {
    "flip": flips,
    "cut": cuts,
    "gone": lambda data, rng: iter([None]),
}


# orbax leaves a coroutine behind for one in a thousand damaged files; pytest makes the warning of it an error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("save", [by_one_process, by_two_processes])
def test_every_file_of_a_checkpoint(save, program_env, tmp_path, capfd):
    """The newest is damaged, one file at a time: named and the one before restored, or harmless and it is restored."""
    folder, warned, rng = tmp_path / "checkpoints", [], random.Random(SEED)
    save(folder, program_env)
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and re.match(r"(parts-)?3\b", named(path, folder))
    )
    seen, wrong = collections.Counter(), []
    capfd.readouterr()
    for path in files:
        data = path.read_bytes()
        for kind, damage in DAMAGES.items():
            for changed in damage(data, rng) if data or kind == "gone" else ():
                path.unlink() if changed is None else path.write_bytes(changed)
                warned.clear()
                outcome = restored(folder, warned)
                said = "".join(capfd.readouterr())
                path.write_bytes(data)
                seen[kind, outcome] += 1
                right = (outcome == 2 and len(warned) == 1 and "step 3" in warned[0]) or (outcome == 3 and not warned)
                if not right or said or FOREIGN.search("".join(warned).replace(str(folder), "")):
                    wrong.append((named(path, folder), kind, outcome, list(warned), said[-300:]))
    print(f"\n{save.__name__}: {len(files)} files, {dict(seen)}")
    assert not wrong, (len(wrong), wrong[:8])
    assert restored(folder, warned) == 3


def named(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def restored(folder: Path, warned: list[str]) -> Any:
    """The step whose values came back, or the error."""
    with Checkpoints(folder, warn=warned.append) as checkpoints:
        try:
            return step_of(checkpoints.restore(values(0)).state)
        except Exception as error:
            return repr(error)


def large(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {f"w{i}": rng.random(12_000) for i in range(10)}  # 1 MB, and does not compress


def save_again_and_again(folder: Path, limit: Callable[[], Any], says: str) -> collections.Counter:
    """Saves under a limit that is drawn each time: it fails in one line and leaves the two before, or is complete."""
    step, seen = 2, collections.Counter()
    with Checkpoints(folder) as checkpoints:
        for one in (1, 2):
            checkpoints.save(one, large(one), {})
        for _ in range(max(5, FLIPS)):
            error = None
            with limit():
                try:
                    checkpoints.save(step + 1, large(step + 1), {})
                except CheckpointError as refused:
                    error = str(refused)
            step += error is None
            seen["saved" if error is None else "refused"] += 1
            if error is not None:
                assert says in error and f"step {step} is intact" in error
                assert not FOREIGN.search(error.replace(str(folder), "")), error
            assert sorted(os.listdir(folder)) == sorted([str(step - 1), str(step)])
            state = checkpoints.restore(large(0)).state
            assert all(np.array_equal(state[name], value) for name, value in large(step).items())
    return seen


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.timeout(1200)
def test_a_disk_that_is_full_at_a_random_byte(disk, capfd):
    rng, ballast = random.Random(SEED), disk / "ballast"

    @contextlib.contextmanager
    def limit() -> Iterator[None]:
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - rng.randrange(1_300_000))))
        yield
        ballast.unlink()

    seen = save_again_and_again(disk / "c", limit, "disk full: ")
    assert capfd.readouterr() == ("", "")
    with capfd.disabled():
        print(f"\ndisk full: {dict(seen)}")


@pytest.mark.timeout(1200)
def test_a_write_that_ends_at_a_random_byte_of_a_file(tmp_path, capfd):
    """Without a mount: no file may be longer than so many bytes."""
    rng, (soft, hard) = random.Random(SEED), resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limit() -> Iterator[None]:
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** rng.uniform(0, 6.2)), hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)

    seen = save_again_and_again(tmp_path, limit, "could not be written")
    assert capfd.readouterr() == ("", "")
    with capfd.disabled():
        print(f"\nlimit of a file: {dict(seen)}")


READ_ONLY = """
import sys
from fr_jax.training.checkpoints import CheckpointError, Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    print(checkpoints.restore({"x": 0}).state["x"])
    try:
        checkpoints.save(3, {"x": 3}, {})
    except CheckpointError as error:
        print(error)
"""


def test_a_read_only_folder(disk, program_env):
    """As root, so by a mount: it is read, and what cannot be written is said in one line."""
    folder = disk / "c"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"x": 1}, {})
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, folder], env=program_env, capture_output=True, text=True, timeout=300
    )
    first, said = done.stdout.splitlines()
    assert (first, done.stderr) == ("1", "") and "step 1 is intact" in said and "Read-only file system" in said


def test_a_program_in_a_read_only_folder(disk, program_env, monkeypatch, capsys):
    from fr_jax.experiments import mnist

    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(SystemExit) as stopped:
        sys.exit(mnist.main(["--dataset", "digits", "--steps", "2", "--workdir", str(disk / "run")]))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "cannot be written" in said and len(said.splitlines()) == 1
    assert json.dumps(os.listdir(disk)) == "[]"
