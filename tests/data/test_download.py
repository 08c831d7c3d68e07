import hashlib
import threading
import time

import pytest

from fr_jax.data import download
from fr_jax.data.download import Archive, FetchError

NAME, CONTENT = "file.tar.gz", bytes(range(256)) * 1000
CHECKSUM = hashlib.md5(CONTENT).hexdigest()
CLOSED = "http://127.0.0.1:1/"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FR_JAX_CACHE", str(folder))
    return folder


def archive(*urls):
    return Archive(urls[0] + NAME, CHECKSUM, tuple(url + NAME for url in urls[1:]))


def fail(*urls):
    with pytest.raises(FetchError) as caught:
        download.fetch(archive(*urls), log=lambda _: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_downloaded_once(server, cache):
    one, lines = server({NAME: CONTENT}), []
    assert download.cached(archive(one.url)) is None
    for _ in range(2):
        assert download.fetch(archive(one.url), log=lines.append) == cache / NAME
    assert (cache / NAME).read_bytes() == CONTENT and download.cached(archive(CLOSED)) == cache / NAME
    assert one.sent == [NAME]
    assert lines == [f"Downloading {one.url}{NAME} into {cache}"]


def test_a_broken_transfer_is_started_again(server, cache):
    one = server({NAME: CONTENT}, cut_after=1000, cuts=download.RETRIES)
    assert download.fetch(archive(one.url), log=lambda _: None).read_bytes() == CONTENT
    assert len(one.sent) == 1 + download.RETRIES


def test_a_transfer_that_keeps_breaking_leaves_no_file(server, cache):
    one = server({NAME: CONTENT}, cut_after=1000)
    assert "the transfer broke off" in fail(one.url)
    assert list(cache.iterdir()) == []


def test_a_wrong_checksum(server, cache):
    message = fail(server({NAME: b"<html>please log in</html>"}).url)
    assert f"its MD5 checksum is not {CHECKSUM}" in message and "login page" in message
    assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_replaced(server, cache):
    cache.mkdir()
    (cache / NAME).write_bytes(b"damaged")
    assert download.fetch(archive(server({NAME: CONTENT}).url), log=lambda _: None).read_bytes() == CONTENT


def test_a_missing_page(server):
    assert "127.0.0.1 answered 404 Not Found" in fail(server({}).url)


def test_no_network():
    begin = time.monotonic()
    assert "no connection to 127.0.0.1" in fail(CLOSED)
    assert time.monotonic() - begin < 10


def test_a_folder_that_cannot_be_written(server, cache):
    cache.write_text("a file")
    assert "could not be downloaded" in fail(server({NAME: CONTENT}).url)


@pytest.mark.parametrize("files", [{}, {NAME: b"<html>log in</html>"}])
def test_the_next_mirror_is_tried(files, server):
    first, second = server(files), server({NAME: CONTENT})
    assert download.fetch(archive(first.url, second.url), log=lambda _: None).read_bytes() == CONTENT
    assert second.sent == [NAME]


def test_each_mirror_that_fails_is_named(server):
    first, second = server({}), server({NAME: b"else"})
    message = fail(first.url, second.url)
    assert f"{first.url}{NAME} could not be downloaded: 127.0.0.1 answered 404 Not Found" in message
    assert f"{second.url}{NAME} arrived damaged: its MD5 checksum is not" in message


def test_only_a_file_that_a_server_has_is_reachable(server):
    download.check_reachable(archive(CLOSED, server({NAME: CONTENT}).url))
    with pytest.raises(FetchError, match="404"):
        download.check_reachable(archive(server({}).url))


def test_a_name_server_that_never_answers_does_not_hang(monkeypatch):
    import requests

    end = threading.Event()
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(requests, "head", lambda *_, **__: end.wait(20))
    assert "no answer from 127.0.0.1 within 0.1 s" in fail(CLOSED)
    end.set()
