"""Ctrl-C while a program is starting."""

import signal
import subprocess
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("needs POSIX signals", allow_module_level=True)


def interrupted(words, env):
    """What a Python process prints on stderr, and its exit code, if it gets Ctrl-C in the middle of JAX's import."""
    command = [sys.executable, "-X", "importtime", *words]
    # The job of a shell in the background ignores Ctrl-C, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if "jax._src.core" in line:
                    break
            process.send_signal(signal.SIGINT)
            lines = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
            return lines, process.wait(30)
        finally:
            process.kill()


@pytest.mark.parametrize("program", ["fr_jax.experiments.mnist", "fr_jax.launch"])
def test_a_program_that_still_imports_ends_with_one_line(program, program_env):
    lines, code = interrupted(["-m", program, "--help"], program_env)
    assert (lines, code) == (["fr_jax: stopped while it was starting; nothing was done."], 130)


@pytest.mark.slow
def test_a_program_of_the_user_has_its_own_interrupts(program_env):
    lines, _ = interrupted(["-c", "import fr_jax, time; time.sleep(30)"], program_env)
    assert lines[-1] == "KeyboardInterrupt"
