"""Downloads into the user's cache folder: verified, resumable, and quick to say that there is no network."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import requests

__all__ = ["Archive", "DataError", "FetchError", "cache_folder", "cached", "check_reachable", "fetch"]

CONNECT_SECONDS = 5.0
OPEN_SECONDS = 10.0  # name look-up, connection and answer together: a firewall that drops packets must not hang us
READ_SECONDS = 30.0
BLOCK = 1 << 16  # bytes; what a broken transfer may lose
ATTEMPTS = 4  # continuations of a transfer that breaks off, each only if the one before brought something

Log = Callable[[str], Any]
T = TypeVar("T")


class DataError(ValueError):
    """Missing or damaged data. The message says what was given, what would be valid, and what to do."""


class FetchError(DataError):
    """A download that did not succeed; what arrived of it is kept and continued next time."""


class Archive(NamedTuple):
    """One file on the web.

    Attributes:
      url: where it is.
      md5: its checksum, as its publisher states it.
      mirrors: other URLs of the same file, under the same name, tried in turn where ``url`` fails.
    """

    url: str
    md5: str
    mirrors: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """The last part of the URL, which is also the name in the cache folder."""
        return self.url.rsplit("/", 1)[-1]


def cache_folder() -> Path:
    """Where downloads are kept: ``$FR_JAX_CACHE``, or else the user's cache folder of this system."""
    import pooch

    return Path(os.environ.get("FR_JAX_CACHE") or pooch.os_cache("fr_jax")).expanduser()


def cached(archive: Archive) -> Path | None:
    """The archive in the cache folder, or ``None`` if it is not there whole (its checksum is computed)."""
    import pooch

    path = cache_folder() / archive.file_name
    return path if path.is_file() and pooch.file_hash(str(path), alg="md5") == archive.md5 else None


def fetch(archive: Archive, *, log: Log = print) -> Path:
    """Downloads ``archive`` into the cache folder with a progress bar, unless it is there already.

    What arrived of a broken transfer stays beside it as ``<name>.part`` and is continued by the next mirror, or by the
    next call.

    Args:
      archive: what to fetch.
      log: takes one line for a person.

    Returns:
      The path of the verified file.

    Raises:
      FetchError: no network, a broken transfer, a wrong checksum, or a folder that cannot be written; with a reason
        for each mirror.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    downloader = functools.partial(_download_or_continue, log=log)

    def retrieve(url: str) -> str:
        return pooch.retrieve(url, f"md5:{archive.md5}", archive.file_name, cache_folder(), downloader=downloader)

    return Path(_from_one_of(archive, retrieve))


def check_reachable(archive: Archive) -> None:
    """Asks the servers for ``archive`` and hangs up: programs that wait much longer may be started then.

    Raises:
      FetchError: no network, or no such file.
    """

    def ask(url: str) -> None:
        with _open(url, 0) as response:
            response.raise_for_status()

    _from_one_of(archive, ask)


def _from_one_of(archive: Archive, work: Callable[[str], T]) -> T:
    """The result of ``work`` for the first of the URLs where it succeeds."""
    failures, cause = [], None
    for url in (archive.url, *archive.mirrors):
        try:
            return work(url)
        except OSError as error:
            failures.append(f"{url} could not be fetched: {_reason(error, url)}")
            cause = error
        except ValueError as error:
            failures.append(
                f"{url} arrived damaged: its MD5 checksum is not {archive.md5}. It was deleted; "
                "try again, and check that no proxy or login page stands between this machine and the server"
            )
            cause = error
    raise FetchError("; ".join(failures) + _what_is_kept(archive)) from cause


def _download_or_continue(url: str, output_file: str, pooch: object, *, log: Log) -> None:
    """A pooch downloader that appends to ``<name>.part`` and moves it to ``output_file`` when it is complete."""
    del pooch
    part = _part(Path(output_file).parent, url)
    with _exclusive(part) as file:
        for attempt in range(ATTEMPTS):
            size_before = file.tell()
            try:
                _append_the_rest(url, file, log)
                break
            except OSError:
                if attempt + 1 == ATTEMPTS or file.tell() <= size_before:
                    raise
    os.replace(part, output_file)


def _append_the_rest(url: str, file: IO[bytes], log: Log) -> None:
    from tqdm import tqdm

    start = file.tell()
    with _open(url, start) as response:
        if start and response.status_code == 416:
            return  # nothing is left to send; the checksum tells whether what we have is right
        response.raise_for_status()
        if response.status_code != 206:  # the server does not continue files: from the beginning
            start = 0
            file.truncate(0)
            file.seek(0)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        name = url.rsplit("/", 1)[-1]
        log(f"Fetching {url} into {cache_folder()}" + (f", continuing at {start / 1e6:.1f} MB" if start else ""))
        with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar:
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
    if total is not None and file.tell() < total:
        raise ConnectionError("the transfer broke off")


def _open(url: str, start: int) -> requests.Response:
    """The server's answer from byte ``start`` on, within ``OPEN_SECONDS`` whatever the name server does."""
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    answers: queue.Queue[requests.Response | OSError | ValueError] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(requests.get(url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)))
        except (OSError, ValueError) as error:
            answers.put(error)

    # A daemon, because a blocked name look-up cannot be cancelled and must not keep the program from ending.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=OPEN_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer from {urlsplit(url).hostname} within {OPEN_SECONDS:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[IO[bytes]]:
    """``path`` opened for appending, by one process at a time (where the system has ``flock``)."""
    with path.open("ab") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"another process is downloading it to {path}; wait until it is done") from None
        yield file


def _part(folder: Path, url: str) -> Path:
    return folder / (url.rsplit("/", 1)[-1] + ".part")


def _reason(error: OSError, url: str) -> str:
    """Why a download failed, in one line; requests' own messages are long and quote its internals."""
    import requests

    host = urlsplit(url).hostname
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{host} answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the transfer broke off"
    if isinstance(error, requests.RequestException):
        return f"no connection to {host}"
    return str(error)


def _what_is_kept(archive: Archive) -> str:
    part = _part(cache_folder(), archive.url)
    kept = part.stat().st_size if part.is_file() else 0
    return f" ({kept / 1e6:.1f} MB are kept in {part}; the next try continues there)" if kept else ""
