"""The source code of Python's standard library, text that every machine has, joined into two files."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fr_jax.data.download import DataError, cache_folder

__all__ = ["joined", "version"]

# Tests, packages of others, and tables that a script has written.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"}
LAYOUT = 1  # of what `joined` writes; part of the folder's name


def version() -> str:
    """Such as ``CPython 3.11.7``."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def joined(choose: Callable[[Mapping[str, int]], set[str]], log: Callable[[str], Any]) -> tuple[Path, Path, int]:
    """The files with the bytes to train on and those held out, made if they are not there, and their CRC32.

    Args:
      choose: ``{name: size} -> names`` of the files to hold out.
      log: receives a line when the files are made.

    Raises:
      DataError: this Python has no source code, or the cache folder cannot be written.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(_names(library))
    if not names:
        raise DataError(f"this Python has no source code of its library in {library}. Give text of your own by --text.")
    sizes = {name: (library / name).stat().st_size for name in names}
    # Not the version alone: distributions change the library, and a file may be edited.
    key = hashlib.sha256(repr((LAYOUT, sorted(sizes.items()))).encode()).hexdigest()[:12]
    folder = cache_folder() / "text" / f"python-{platform.python_version()}-{key}"
    try:
        if not folder.is_dir():
            log(f"Joining the source code of {version()} in {folder}")
            _make(library, names, choose, folder)
        train, held_out = folder / "train.bin", folder / "held_out.bin"
        return train, held_out, zlib.crc32(held_out.read_bytes(), zlib.crc32(train.read_bytes()))
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be used ({error.strerror or error}). Set FR_JAX_CACHE to a folder that "
            "can be written, or give text of your own by --text."
        ) from error


def _names(library: Path) -> list[str]:
    """Of all its modules, relative to it, with ``/``."""
    found = []
    for where, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith((".", "config-"))]
        found += [Path(where, name).relative_to(library).as_posix() for name in names if name.endswith(".py")]
    return found


def _make(library: Path, names: list[str], choose: Callable[[Mapping[str, int]], set[str]], folder: Path) -> None:
    texts: dict[str, bytes] = {}
    seen = set()
    for name in names:
        content = (library / name).read_bytes()
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen and _is_utf8(content):
            seen.add(digest)
            texts[name] = content
    held_out = choose({name: len(content) for name, content in texts.items()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file, wanted in (("train.bin", False), ("held_out.bin", True)):
            parts = [content for name, content in texts.items() if (name in held_out) is wanted]
            with (temporary / file).open("wb") as stream:
                stream.write(b"".join(parts))
                stream.flush()
                os.fsync(stream.fileno())
        temporary.chmod(0o755)  # mkdtemp's folders are for one user
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
