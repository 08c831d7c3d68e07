"""Downloads into the user's cache folder: verified by checksum, from several mirrors, and quick to fail offline."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

__all__ = ["Archive", "DataError", "FetchError", "cache_folder", "cached", "check_reachable", "fetch"]

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0  # for name look-up, connection and answer together
READ_SECONDS = 30.0
RETRIES = 2  # how often a transfer that breaks off is started again from the same URL

Log = Callable[[str], Any]
T = TypeVar("T")


class DataError(ValueError):
    """Missing or damaged data. The message says what was given, what would be valid, and what to do."""


class FetchError(DataError):
    """A download failed."""


class Archive(NamedTuple):
    """One file on the web, with its publisher's checksum; the mirrors are tried in turn if ``url`` fails."""

    url: str
    md5: str
    mirrors: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """The last part of the URL, which is also the name in the cache folder."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def again(self) -> str:
        """What to do about a damaged file, for messages."""
        return f"The file is damaged, or not what it should be: download {self.url} again"


def cache_folder() -> Path:
    """The folder for downloads: ``$FR_JAX_CACHE``, or the user's cache folder of this system."""
    import pooch

    return Path(os.environ.get("FR_JAX_CACHE") or pooch.os_cache("fr_jax")).expanduser()


def cached(archive: Archive) -> Path | None:
    """The archive in the cache folder, or ``None`` if it is not there or its checksum differs."""
    import pooch

    path = cache_folder() / archive.file_name
    return path if path.is_file() and pooch.file_hash(str(path), alg="md5") == archive.md5 else None


def fetch(archive: Archive, *, log: Log = print) -> Path:
    """The verified ``archive`` in the cache folder, downloaded unless it is there; ``log`` gets a line per download.

    Raises:
      FetchError: no network, a broken transfer, a wrong checksum, or a folder that cannot be written; with the reason
        for each mirror.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # each download is announced below

    def download(url: str) -> Path:
        _check_answers(url)
        log(f"Downloading {url} into {cache_folder()}")
        timeout = (CONNECT_SECONDS, READ_SECONDS)
        downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=timeout)
        name, checksum = archive.file_name, f"md5:{archive.md5}"
        # Not pooch.retrieve: only a Pooch tries again.
        files = pooch.create(cache_folder(), "", registry={name: checksum}, urls={name: url}, retry_if_failed=RETRIES)
        return Path(files.fetch(name, downloader=downloader))  # type: ignore[arg-type]  # pooch 1.9 annotates it wrongly

    return cached(archive) or _first_success(archive, download)


def check_reachable(archive: Archive) -> None:
    """Checks that a server offers ``archive``, before a program is started that would wait much longer for it.

    Raises:
      FetchError: no network, or no such file.
    """
    _first_success(archive, _check_answers)


def _first_success(archive: Archive, attempt: Callable[[str], T]) -> T:
    """The result of ``attempt`` for the first URL for which it succeeds."""
    failures, cause = [], None
    for url in (archive.url, *archive.mirrors):
        try:
            return attempt(url)
        except OSError as error:
            failures.append(f"{url} could not be downloaded: {_reason(error, url)}")
            cause = error
        except ValueError as error:  # pooch's, after it has deleted the file
            advice = "Try again, and check that no proxy or login page stands between this machine and the server"
            failures.append(f"{url} arrived damaged: its MD5 checksum is not {archive.md5}. {advice}")
            cause = error
    raise FetchError("; ".join(failures)) from cause


def _check_answers(url: str) -> None:
    """Raises an OSError if the server does not offer ``url`` within ``ANSWER_SECONDS``."""
    import requests

    answers: list[requests.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(requests.head(url, allow_redirects=True, timeout=CONNECT_SECONDS))
        except Exception as error:
            answers.append(error)

    # The timeout of requests does not cover the name look-up, which can hang for a minute behind a firewall and cannot
    # be cancelled. A daemon thread does not keep the program from ending.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not answers:
        raise TimeoutError(f"no answer from {urlsplit(url).hostname} within {ANSWER_SECONDS:g} s")
    if isinstance(answers[0], Exception):
        raise answers[0]
    answers[0].raise_for_status()


def _reason(error: OSError, url: str) -> str:
    """Why a download failed, in one line; the messages of requests are long and quote its internals."""
    import requests

    host = urlsplit(url).hostname
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{host} answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the transfer broke off"
    if isinstance(error, requests.RequestException):
        return f"no connection to {host}"
    return str(error)
