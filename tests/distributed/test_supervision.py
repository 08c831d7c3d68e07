import os
import sys

import pytest

from fr_jax.distributed import _supervision as supervision
from fr_jax.distributed._supervision import EARLY_SECONDS, GRACE_SECONDS, NEVER, SIGNAL_SECONDS, STOP_SECONDS
from fr_jax.distributed.launch import start, wait

LATE = "import os, time; os.environ['FR_JAX_PROCESS_ID'] == '0' and time.sleep({})"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_one_that_ends_early_is_named_and_the_others_end(monkeypatch, capfd):
    monkeypatch.setattr(supervision, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(supervision, "EARLY_SECONDS", 0.7)
    assert wait(start(["-c", LATE.format(100)], 2, pin=False)) == 1
    remark, verdict = capfd.readouterr().err.splitlines()
    assert remark == "fr_jax: process 1 ended with code 0 before process 0, which must end within 0.7 s of it."
    assert verdict.startswith(
        "fr_jax: process 0 did not end within 0.7 s of process 1, which ended with code 0, and is"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_one_that_needs_longer_may(capfd):
    assert wait(start(["-c", LATE.format(0.5)], 2, pin=False)) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("failed", "early", "signals", "deadline"),
    [
        (NEVER, NEVER, [], NEVER),
        (50, 40, [], 50 + GRACE_SECONDS),
        (NEVER, 40, [], 40 + EARLY_SECONDS),
        (NEVER, NEVER, [15], 15 + SIGNAL_SECONDS),
        (50, NEVER, [15], 50 + STOP_SECONDS),
        (NEVER, 50, [15], 50 + STOP_SECONDS),
        (NEVER, 10, [100], 100 + STOP_SECONDS),
        (50, NEVER, [52], 50 + GRACE_SECONDS),
        (NEVER, NEVER, [15, 20, 30], 20 + GRACE_SECONDS),
    ],
)
def test_how_long_the_others_have(failed, early, signals, deadline):
    assert supervision._deadline(failed, early, [(2, moment) for moment in signals]) == deadline


def test_lines_of_a_progress_bar_are_marked_too(capsys):
    read, write = os.pipe()
    os.write(write, b"one\n\r 10%\r 20%\nlast")
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        supervision._relay(pipe, sys.stdout, "[3] ")
    assert capsys.readouterr().out == "[3] one\n[3] \r[3]  10%\r[3]  20%\n[3] last\n"
