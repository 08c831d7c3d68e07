import threading
import time

import jax
import pytest

from fr_jax.distributed import _coordination, _liveness

HEARTBEAT = 0.4


class Store:
    """What the processes share; ``is_cut``: process 0 cannot be reached."""

    def __init__(self):
        self.kept, self.is_cut = {}, False

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.kept[key] = value

    def key_value_dir_get(self, key):
        return [item for item in self.kept.items() if item[0].startswith(key)]

    def blocking_key_value_get(self, key, milliseconds):
        if self.is_cut or key not in self.kept:
            time.sleep(milliseconds / 1000)
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.kept[key]


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(_coordination, "client", lambda: store)
    return store


@pytest.fixture
def listen(store):
    """``index -> None``: process ``index`` of three listens, until the test is over."""
    over, threads = threading.Event(), []

    def listen(index):
        threads.append(threading.Thread(target=_liveness._listen, args=(index, 3, HEARTBEAT, over)))
        threads[-1].start()

    listen.over = over
    yield listen
    over.set()
    for thread in threads:
        thread.join()


def wait_for(capsys, *texts):
    begun, said = time.monotonic(), ""
    while not all(text in said for text in texts):
        assert time.monotonic() - begun < 20, said
        time.sleep(0.02)
        said += capsys.readouterr().err
    return said


def test_the_first_process_names_one_that_is_silent(store, listen, capsys):
    listen(0)
    said = wait_for(capsys, "process 0 has not heard of process 1 for", "process 0 has not heard of process 2 for")
    assert len(said.splitlines()) == 2 and "--resume" in said
    listen(1)  # late
    wait_for(capsys, "process 0 hears of process 1 again.")


def test_the_others_say_that_they_cannot_reach_the_first(store, listen, capsys):
    listen(0)
    listen(1)
    listen(2)
    time.sleep(2 * HEARTBEAT)
    capsys.readouterr()
    store.is_cut = True
    wait_for(capsys, "process 1 has not heard of process 0 for", "process 2 has not heard of process 0 for")
    store.is_cut = False
    wait_for(capsys, "process 1 hears of process 0 again.", "process 2 hears of process 0 again.")


def test_one_that_has_left_is_not_missed(store, listen, capsys):
    store.kept["fr_jax/alive/0"] = "0"
    listen.over.set()
    listen(1)
    listen(2)
    time.sleep(HEARTBEAT)
    assert [*store.kept.values()] == ["0", "left", "left"]
    listen.over.clear()
    capsys.readouterr()
    listen(0)
    time.sleep(2 * HEARTBEAT)
    assert capsys.readouterr().err == ""
