import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._run.compiled import keep_compiled, this_machine

SMALL = ["--K=1", "--dataset=synthetic", "--model=mlp", "--depth=1", "--steps=1", "--batch-size=8", "--test-examples=8"]


@pytest.fixture
def enabled():
    """JAX's settings as they are outside the tests, and as before afterwards."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_compilation_cache_max_size",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_auto_is_a_folder_of_this_kind_of_machine(enabled, tmp_path, monkeypatch):
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path))
    folder = keep_compiled("auto")
    assert folder == tmp_path / "compiled" / this_machine()
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_jax_settings_win(enabled, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert keep_compiled("auto") == tmp_path / "own"
    assert keep_compiled("none") is None
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled("auto") is None


def test_a_home_that_cannot_be_written_is_no_reason_not_to_start(enabled, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path / "file"))
    assert keep_compiled("auto") is None and jax.config.jax_compilation_cache_dir is None
    assert "fr_jax: what is compiled is not kept" in capsys.readouterr().err
    with pytest.raises(SettingsError, match=f"--compilation-cache {tmp_path}/file cannot be written: File exists"):
        keep_compiled(str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match="cannot be written: Permission denied"):
        keep_compiled(str(tmp_path))


def test_what_was_compiled_before_is_found(enabled, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    keep_compiled(str(tmp_path / "compiled"))
    compilation_cache.reset_cache()  # or it goes on with the folder of the other tests
    found: list[str] = []
    listen = lambda event, **more: found.append(event)
    jax.monitoring.register_event_listener(listen)
    try:
        for hits in (0, 1):
            jax.jit(lambda x: x * 3 + 1)(np.arange(7.0))  # another function each time, as in another process
            assert found.count("/jax/compilation_cache/cache_hits") == hits
    finally:
        jax.monitoring.unregister_event_listener(listen)
        compilation_cache.reset_cache()
    assert any((tmp_path / "compiled").iterdir())


@pytest.mark.slow
def test_the_second_start_finds_what_the_first_compiled(tmp_path, program_env):
    folder = tmp_path / "compiled"
    env = {k: v for k, v in program_env.items() if not k.startswith("JAX_COMPILATION")} | {"JAX_LOGGING_LEVEL": "DEBUG"}
    command = [sys.executable, "-m", "fr_jax.experiments.cifar", *SMALL, "--compilation-cache", str(folder)]
    hits = []
    for run in ("first", "second"):
        words = [*command, "--workdir", str(tmp_path / run)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        hits.append(done.stderr.count("Persistent compilation cache hit"))
    assert hits[0] < hits[1]
    assert any(folder.iterdir())
