import builtins
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from fr_jax import _files as files
from fr_jax._files import write_json
from fr_jax.training.metrics_log import MetricsLog, read_rows

ROWS = [
    {"step": 10, "epoch": 0.5, "train_loss": 2.25, "train_accuracy": 0.125, "images_per_s": 512.0, "seconds": 1.5},
    {"step": 20, "epoch": 1.0, "train_loss": 1.125, "train_accuracy": 0.5, "images_per_s": 600.0, "seconds": 2.5},
    {"step": 20, "epoch": 1.0, "test_loss": 1.0, "test_accuracy": 0.625, "seconds": 2.5},
    {"step": 30, "epoch": 1.5, "train_loss": 0.5, "train_accuracy": 0.75, "images_per_s": 610.0, "seconds": 3.5},
]


def write_rows(path: pathlib.Path) -> None:
    with MetricsLog(path) as log:
        for row in ROWS:
            log.write(row)


def strict(line: str) -> dict:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_rows_come_back_in_order_one_a_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write_rows(path)
    assert read_rows(path) == ROWS
    lines = path.read_text().splitlines()
    assert [strict(line) for line in lines] == ROWS
    assert list(strict(lines[0])) == list(ROWS[0])


def test_a_row_is_readable_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(ROWS[0])
    assert read_rows(tmp_path / "m.jsonl") == ROWS[:1]
    log.close()


def test_numbers_that_are_not_finite_and_array_scalars(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": np.int64(1), "a": jnp.float32(0.5), "b": float("nan"), "c": -np.inf, "d": np.arange(2)})
        log.write({"step": 2, "nested": {"x": [1.0, jnp.inf]}})
    assert [strict(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "a": 0.5, "b": None, "c": None, "d": [0, 1]},
        {"step": 2, "nested": {"x": [1.0, None]}},
    ]


@pytest.mark.parametrize(("resume_step", "kept"), [(0, 0), (10, 1), (20, 3), (29, 3), (30, 4), (99, 4)])
def test_resuming_drops_later_rows(tmp_path, resume_step, kept):
    path = tmp_path / "m.jsonl"
    write_rows(path)
    with MetricsLog(path, resume_step) as log:
        log.write({"step": 100})
    assert read_rows(path) == [*ROWS[:kept], {"step": 100}]
    assert os.listdir(tmp_path) == ["m.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 40, "tra', b"{", b"\x00\x00\x00", b'{"step": 40, "s": "\xe2\x82', b"40"])
def test_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    write_rows(path)
    with path.open("ab") as file:
        file.write(torn)
    assert read_rows(path) == ROWS
    with MetricsLog(path, resume_step=30) as log:
        log.write({"step": 40})
    assert read_rows(path) == [*ROWS, {"step": 40}]


def test_a_last_line_without_newline_is_completed(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    with MetricsLog(path, resume_step=2) as log:
        log.write({"step": 3})
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*m\.jsonl is damaged"):
        read_rows(path)


def test_a_new_log_does_not_take_over_another(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path)
    with pytest.raises(FileExistsError, match="another run"):
        MetricsLog(path)
    assert read_rows(path) == ROWS
    MetricsLog(tmp_path / "new.jsonl", resume_step=5).close()  # killed before its first row
    assert read_rows(tmp_path / "new.jsonl") == []


def test_killed_rows_survive(tmp_path, program_env):
    program = f"""
        import os, signal
        from fr_jax.training.metrics_log import MetricsLog
        log = MetricsLog({str(tmp_path / "m.jsonl")!r})
        for step in range(5):
            log.write({{"step": step}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=program_env)
    assert killed.returncode == -signal.SIGKILL
    assert read_rows(tmp_path / "m.jsonl") == [{"step": step} for step in range(5)]


def test_write_json(tmp_path):
    path = tmp_path / "summary.json"
    value = {"z": 1, "a": [np.float32(0.5), float("inf")], "path": pathlib.Path("x"), "ü": None, "t": True}
    write_json(path, value)
    text = path.read_text()
    assert strict(text) == {"z": 1, "a": [0.5, None], "path": "x", "ü": None, "t": True}
    assert list(strict(text)) == list(value)
    assert text.startswith('{\n  "z": 1,\n')
    write_json(path, {})
    assert path.read_text() == "{}\n"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"disk full \(free \d+\.\d MB .*summary\.json is unchanged") as error:
        write_json(path, {"new": 2})
    assert error.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_log_on_a_full_disk(tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    path = tmp_path / "m.jsonl"
    try:
        with MetricsLog(path) as log:
            log.write(ROWS[0])
            with pytest.raises(OSError, match="disk full"):
                log.write({"step": 20, "text": "x" * 100_000})
            log.write(ROWS[1])
            assert read_rows(path) == ROWS[:2]
            with pytest.raises(OSError, match="disk full"):
                write_json(tmp_path / "s.json", ["x" * 100_000])
            assert os.listdir(tmp_path) == ["m.jsonl"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_tensorboard(tmp_path, monkeypatch):
    shown: list[tuple[str, float, int]] = []
    tensorboardx = pytest.importorskip("tensorboardX")
    real = tensorboardx.SummaryWriter.add_scalar

    def add_scalar(self, tag, value, step):
        shown.append((tag, value, step))
        return real(self, tag, value, step)

    monkeypatch.setattr(tensorboardx.SummaryWriter, "add_scalar", add_scalar)
    with MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "events") as log:
        log.write({"step": 10, "epoch": 0.5, "train_loss": jnp.float32(2.0), "test_accuracy": 0.5, "seconds": 3})
        log.write({"step": 20, "train_loss": float("nan"), "note": "text"})
    assert shown == [("train/loss", 2.0, 10), ("test/accuracy", 0.5, 10), ("run/seconds", 3, 10)]
    assert [path.stat().st_size > 100 for path in (tmp_path / "events").iterdir()] == [True]


def test_tensorboard_missing(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name == "tensorboardX":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(ImportError, match=r"pip install 'fr_jax\[tensorboard\]'"):
        MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path)
