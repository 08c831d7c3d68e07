"""Runs that are killed at random moments, and go on to the bits of runs that were not.

A few kills in the slow tests; as many as one likes, with a line for each, by
``FR_JAX_KILLS=200 FR_JAX_KILLS_LOG=kills.jsonl pytest -m slow -s tests/campaigns/test_kill.py``. Kills that the log has
are not done again. ``FR_JAX_SEED`` draws other moments.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

KILLS, SEED = int(os.environ.get("FR_JAX_KILLS", "4")), int(os.environ.get("FR_JAX_SEED", "0"))
INTERVAL, STEPS = 7, 120
LIMIT = 600
"""Seconds after which a run counts as one that hangs."""
PROGRAM = ["-m", "fr_jax.experiments.mnist", "--dataset", "digits", "--depth", "4", "--width", "16"]
PROGRAM += ["--eval-every", "100", "--log-every", 2, "--checkpoint-every", INTERVAL]
PROGRAM += ["--steps", STEPS]
LAUNCH = ["-m", "fr_jax.launch", "--processes", "2", "--no-pin", "--"]
RUNS = {
    "fr": ["--method", "fr", "--K", "3", "--microbatches", "2", "--weight-prediction", "1"],
    "ddg": ["--method", "ddg", "--K", "3", "--microbatches", "2"],
    "split weights": ["--method", "fr", "--K", "2", "--data-parallel", "2", "--shard-params"],
    "fr-stashed": ["--method", "fr", "--K", "3", "--replay-weights", "stashed"],
    "2bw": ["--method", "2bw", "--K", "2", "--microbatches", "2"],
    "bp": ["--method", "bp", "--K", "3", "--accumulate", "3"],
    "gpipe": ["--method", "gpipe", "--K", "3", "--pipeline-schedule", "1f1b"],
    "dni": ["--method", "dni", "--K", "3"],
    "blockprop": ["--method", "blockprop", "--K", "3", "--cache"],
    "dfa": ["--method", "dfa", "--K", "3"],
    "proxprop": ["--method", "proxprop", "--K", "3"],
    "mac": ["--method", "mac", "--K", "3", "--cache"],
    "eqprop": ["--method", "eqprop", "--K", "1"],
    "admm": ["--method", "admm", "--K", "1"],
}
CASES = list(itertools.product((2, 1), RUNS))
CASES = [(processes, name) for processes, name in CASES if processes == 1 or name not in ("eqprop", "admm")]
"""With one process, it gathers and writes everything; with two, each writes its parts."""


def command(case: tuple[int, str], folder: Path, *more: str) -> list[str]:
    processes, name = case
    optimizer = () if name == "admm" else ("--optimizer", "adamw", "--batch-size", 16)
    words = [*(LAUNCH if processes == 2 else ()), *PROGRAM, *RUNS[name], *optimizer, "--workdir", folder, *more]
    return [sys.executable, *map(str, words)]


def run(words: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, (words, done.stdout[-1500:], done.stderr[-1500:])
    return done.stdout


def last_row(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def members(pid: int) -> list[int]:
    """What the launcher has started."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def killed(words: list[str], env: dict[str, str], folder: Path, rng: random.Random) -> tuple[str, int]:
    """Who was killed, and the last row by then: at a row drawn from all, one in five in the first seconds."""
    started = subprocess.Popen(
        words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    row, late = rng.randrange(STEPS), rng.uniform(0, 0.3)
    early = rng.uniform(0, 20) if rng.random() < 0.2 else LIMIT
    begin = time.monotonic()
    while time.monotonic() - begin < early and last_row(folder) < row and started.poll() is None:
        time.sleep(0.02)
    time.sleep(late)
    group = members(started.pid)
    who = rng.choice(["all", "launcher", *(f"process {i}" for i in range(len(group)))]) if group else "all"
    known, every = last_row(folder), [started.pid, *group]
    for pid in {"all": every, "launcher": [started.pid]}.get(who) or [group[int(who[-1])]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.wait(LIMIT)
    while any(map(alive, group)):  # which end by themselves
        assert time.monotonic() - begin < 2 * LIMIT, f"processes are left after the end of {who}"
        time.sleep(0.05)
    return who, known


def one_kill(kill: int, checksums, expected: dict[str, Any], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Kills a run and lets it go on; what happened, for the log."""
    case = CASES[kill % len(CASES)]
    who, known = killed(command(case, folder), env, folder, random.Random(f"{SEED} {kill}"))
    known = max(known, last_row(folder)) if who != "all" else known
    begin = time.monotonic()
    said = run(command(case, folder, *(["--resume"] if (folder / "config.json").exists() else [])), env)
    resumed = re.search(r"after step ([\d,]+)", said)
    step = int(resumed[1].replace(",", "")) if resumed else last_row(folder) if "is finished" in said else 0
    return {
        "kill": kill,
        "seed": SEED,
        "processes": case[0],
        "method": case[1],
        "killed": who,
        "last_row": known,
        "resumed_after": step,
        "seconds": round(time.monotonic() - begin, 1),
        "within_an_interval": step >= known - INTERVAL,
        "identical": checksums(folder) == expected,
    }


@pytest.mark.slow
@pytest.mark.timeout(400 * KILLS + 600)
def test_killed_at_random_moments(program_env, tmp_path, checksums):
    path = Path(os.environ.get("FR_JAX_KILLS_LOG", tmp_path / "kills.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done, whole = {row["kill"] for row in rows if row["seed"] == SEED}, {}
    for kill in sorted(set(range(KILLS)) - done):
        case, folder = CASES[kill % len(CASES)], tmp_path / f"killed-{kill}"
        if case not in whole:
            run(command(case, tmp_path / f"whole-{kill}"), program_env)
            whole[case] = checksums(tmp_path / f"whole-{kill}")
        rows.append(one_kill(kill, checksums, whole[case], folder, program_env))
        print(rows[-1], flush=True)
        with open(path, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        if rows[-1]["identical"]:
            shutil.rmtree(folder)
    wrong = [row for row in rows if not (row["identical"] and row["within_an_interval"])]
    assert not wrong, wrong
