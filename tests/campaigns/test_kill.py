"""Runs that are killed at random moments, and go on to the bits of runs that were not.

A few kills in the slow tests; as many as one likes, with a line for each, by
``FR_JAX_KILLS=200 pytest -m slow -s tests/campaigns/test_kill.py``. ``FR_JAX_SEED`` draws other moments.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from fr_jax.training.checkpoints import Checkpoints

KILLS, SEED = int(os.environ.get("FR_JAX_KILLS", "4")), int(os.environ.get("FR_JAX_SEED", "0"))
INTERVAL, LOG_EVERY = 7, 2
PROGRAM = ["-m", "fr_jax.experiments.mnist", "--dataset", "digits", "--depth", "4", "--width", "16"]
PROGRAM += ["--batch-size", "16", "--eval-every", "100", "--log-every", LOG_EVERY, "--checkpoint-every", INTERVAL]
PROGRAM += ["--optimizer", "adamw"]
LAUNCH = ["-m", "fr_jax.launch", "--processes", "2", "--no-pin", "--"]
RUNS = {  # methods, and forms of checkpoints: one process, two, and one that goes on with two
    "fr": ["--method", "fr", "--K", "3", "--microbatches", "2", "--weight-prediction", "1"],
    "ddg": ["--method", "ddg", "--K", "3", "--microbatches", "2"],
    "fr-stashed": ["--method", "fr", "--K", "3", "--replay-weights", "stashed"],
    "2bw": ["--method", "2bw", "--K", "2", "--microbatches", "2"],
    "bp": ["--method", "bp", "--K", "3", "--accumulate", "3"],
    "gpipe": ["--method", "gpipe", "--K", "3", "--pipeline-schedule", "1f1b"],
    "dni": ["--method", "dni", "--K", "3"],
    "blockprop": ["--method", "blockprop", "--K", "3", "--cache"],
    "dfa": ["--method", "dfa", "--K", "3"],
    "proxprop": ["--method", "proxprop", "--K", "3"],
    "mac": ["--method", "mac", "--K", "3", "--cache"],
    "fr, split weights": ["--method", "fr", "--K", "2", "--data-parallel", "2", "--shard-params"],
}


def command(name: str, processes: int, folder: Path, steps: int, *more: str) -> list[str]:
    words = [*(LAUNCH if processes == 2 else ()), *PROGRAM, *RUNS[name], "--steps", steps, "--workdir", folder, *more]
    return [sys.executable, *map(str, words)]


def checksums(folder: Path) -> dict[str, object]:
    """Of every array of the newest checkpoint, whatever its form."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        leaves = checkpoints._read(checkpoints.steps()[-1], index=ocp.args.JsonRestore()).index["leaves"]
    crc = lambda entry: [part["crc32"] for part in entry["parts"]] if "parts" in entry else [entry.get("crc32")]
    return {name: (entry["kind"], entry.get("value"), crc(entry)) for name, entry in leaves.items()}


def last_row(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return max((row["step"] for row in whole), default=0)


@pytest.mark.slow
@pytest.mark.timeout(120 * KILLS + 600)
def test_killed_at_random_moments(program_env, tmp_path):
    rng, steps, whole = random.Random(SEED), 280, {}
    names = list(RUNS)
    for kill in range(KILLS):
        name, processes = names[kill % len(names)], 1 + (kill // len(names) + kill) % 2
        if (name, processes) not in whole:
            folder = tmp_path / f"whole {name} {processes}"
            begin = time.monotonic()
            subprocess.run(command(name, processes, folder, steps), env=program_env, check=True, capture_output=True)
            whole[name, processes] = checksums(folder), time.monotonic() - begin
        expected, seconds = whole[name, processes]
        folder, moment = tmp_path / f"cut {kill}", rng.uniform(0.2, 1.0) * seconds
        started = subprocess.Popen(
            command(name, processes, folder, steps),
            env=program_env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(moment)
        kill_all(started)
        known = last_row(folder)
        more = ["--resume"] if (folder / "config.json").exists() else []
        went_on = subprocess.run(
            command(name, processes, folder, steps, *more), env=program_env, capture_output=True, text=True, timeout=300
        )
        assert went_on.returncode == 0, (kill, name, processes, moment, went_on.stdout[-1500:], went_on.stderr[-1500:])
        resumed = re.search(r"Resuming after step ([\d,]+)", went_on.stdout)
        step = int(resumed[1].replace(",", "")) if resumed else 0
        print(f"kill {kill}: {name}, {processes} process(es), after {moment:.1f} s: row {known}, went on after {step}")
        assert step >= known - INTERVAL - LOG_EVERY, (kill, name, processes, moment, known, step)
        assert checksums(folder) == expected, (kill, name, processes, moment)


def kill_all(started: subprocess.Popen) -> None:
    """SIGKILL for the program, and for the processes that the launcher started in sessions of their own."""
    for pid in [*children(started.pid), started.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.wait()


def children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
