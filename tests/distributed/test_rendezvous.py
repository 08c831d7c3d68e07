import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from fr_jax.distributed import _rendezvous as rendezvous
from fr_jax.distributed._joining import free_port


@pytest.fixture
def each():
    """``each((size, index, seconds), ..)``: what became of ``meet`` in threads that are the processes of one group."""

    def each(*processes: tuple[int, int, float]) -> list[BaseException | None]:
        coordinator = f"127.0.0.1:{free_port()}"
        with ThreadPoolExecutor(len(processes)) as pool:
            return [one.exception() for one in [pool.submit(rendezvous.meet, coordinator, *p) for p in processes]]

    return each


def test_all_come(each):
    assert each((3, 2, 20), (3, 0, 20), (3, 1, 20)) == [None] * 3


def test_all_are_told_who_is_missing(each):
    said = [str(error) for error in each((4, 0, 1), (4, 2, 20))]
    assert said[0].startswith("process 1, 3 of 4 did not come to 127.0.0.1:")
    assert said[1].startswith("process 2 of 4 cannot join") and said[0] in said[1]


def test_numbers_that_do_not_fit_are_named(each):
    first, larger, *others = (str(error) for error in each((3, 0, 1), (4, 3, 20), (3, 1, 20), (3, 1, 20)))
    assert "process 2 of 3 did not come" in first
    assert "process 0 has --num-processes 3" in larger
    assert sum("another process has --process-id 1 too" in other for other in others) == 1


def test_one_that_has_left_is_not_counted(each):
    first, *_ = (str(error) for error in each((3, 0, 0.6), (3, 1, 0.2)))
    assert "process 1, 2 of 3 did not come" in first


def test_one_that_comes_again_and_strangers(monkeypatch):
    monkeypatch.setattr(rendezvous, "GREETING_SECONDS", 0.2)
    port = free_port()
    address = ("127.0.0.1", port)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(rendezvous.meet, f"127.0.0.1:{port}", 3, 0, 20)
        gone = pool.submit(rendezvous.meet, f"127.0.0.1:{port}", 3, 1, 0.5)
        assert "could not join" in str(gone.exception())
        with socket.create_connection(address), socket.create_connection(address) as other:
            other.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert other.recv(100).startswith(b"no: ")
        others = [pool.submit(rendezvous.meet, f"127.0.0.1:{port}", 3, i, 20) for i in (1, 2)]
        assert [one.exception() for one in [first, *others]] == [None] * 3


def test_another_program_at_the_port():
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(1) as pool:
        lost = pool.submit(rendezvous.meet, f"127.0.0.1:{taken.getsockname()[1]}", 2, 1, 0.5)
        with taken.accept()[0] as guest:
            guest.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert "timed out" in str(lost.exception()) or "another program" in str(lost.exception())
