"""Published digests of the files of data sets: official is what its authors published, to the last bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fr_jax._files import write_json
from fr_jax.data.download import cache_folder

__all__ = ["is_published", "not_published"]

REMEMBERED = "verified.json"
MOST = 200  # files that are remembered


def is_published(content: bytes, digest: str) -> bool:
    """Whether a file has this MD5 or SHA-1, in hexadecimal digits."""
    algorithm = {32: "md5", 40: "sha1"}[len(digest)]
    return hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() == digest


def not_published(
    contents: Mapping[str, bytes], digests: Mapping[str, str], paths: Mapping[str, Path]
) -> tuple[str, ...]:
    """The names of the files whose unpacked content is not what was published; one without a digest is not compared.

    A file that was right is not read through again: the cache folder has its path, size and time.
    """
    remembered = _remembered()
    different, found = [], {}
    for name in contents.keys() & digests.keys():
        mark = _mark(paths[name], name)
        if remembered.get(mark) == digests[name]:
            continue
        if is_published(contents[name], digests[name]):
            found[mark] = digests[name]
        else:
            different.append(name)
    if found:
        newest = dict(list((remembered | found).items())[-MOST:])
        with contextlib.suppress(OSError):  # then it is compared again
            cache_folder().mkdir(parents=True, exist_ok=True)
            write_json(cache_folder() / REMEMBERED, newest)
    return tuple(sorted(different))


def _mark(path: Path, name: str) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {name}"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads((cache_folder() / REMEMBERED).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
