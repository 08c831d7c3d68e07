import os
import signal
import sys
import time

import pytest

from fr_jax.distributed import _supervision as supervision
from fr_jax.distributed._supervision import EARLY_SECONDS, GRACE_SECONDS, NEVER, SIGNAL_SECONDS, STOP_SECONDS
from fr_jax.distributed.launch import start, wait

LATE = "import os, time; os.environ['FR_JAX_PROCESS_ID'] == '0' and time.sleep({})"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_one_that_ends_early_is_named_and_the_others_end(monkeypatch, capfd):
    monkeypatch.setattr(supervision, "EARLY_SECONDS", 0.3)
    assert wait(start(["-c", LATE.format(100)], 2, pin=False)) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fr_jax: process 0 did not end within 0.3 s of process 1, which ended with code 0, and is")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_one_that_needs_longer_may(capfd):
    assert wait(start(["-c", LATE.format(0.5)], 2, pin=False)) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
@pytest.mark.parametrize(("limit", "deaf"), [("STOP_SECONDS", "1"), ("SIGNAL_SECONDS", "0, 1")])
def test_those_that_do_not_stop_after_a_signal_are_killed(monkeypatch, capfd, limit, deaf):
    monkeypatch.setattr(supervision, limit, 0.5)
    stops = f"import os, sys, time; os.environ['FR_JAX_PROCESS_ID'] in '{deaf}' and time.sleep(100); sys.exit(143)"
    group = start(["-c", stops], 2, pin=False)
    assert supervision._wait_for_all(group, [(signal.SIGTERM, time.monotonic())]) == (143, None)
    assert capfd.readouterr().err == f"fr_jax: process {deaf} did not end by itself, and is killed.\n"
    for process in group:
        process.communicate()


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
        supervision._copy_lines(pipe, sys.stdout, "[3] ")
    assert capsys.readouterr().out == "[3] one\n[3] \r[3]  10%\r[3]  20%\n[3] last\n"


STACK = """before
E1130 23:21:24.284078   22187 coordination_service.cc:1549] [10392933063878083065] Use error polling to propagate
1
The tasks have crashed. Check the task logs for an earlier error.
Traceback (most recent call last):
KeyError: 1
E1130 23:21:24.284844   22198 coordination_service_agent.cc:289] Polled an error from coordination service.
F1130 23:20:23.084046   21486 client.h:80] Terminating process because the JAX distributed service detected errors.
Additional GRPC error information from remote target coordination_service
*** Check failure stack trace: ***
    @     0x7fee34a40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_the_stack_of_a_member_of_a_lost_group_is_one_line(capfd):
    program = f"import os, sys; sys.stderr.write({STACK!r}); sys.stderr.flush(); os.abort()"
    assert wait(start(["-c", program], 1, pin=False)) == 134
    assert capfd.readouterr().err.splitlines()[:-1] == [
        "[0] before",
        "[0] Traceback (most recent call last):",
        "[0] KeyError: 1",
        "[0] fr_jax: JAX ends this process, because another one has died or cannot be reached.",
        "fr_jax: process 0 was ended by SIGABRT; the others cannot continue.",
    ]
