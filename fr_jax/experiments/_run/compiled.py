"""Where the programs keep compiled code, so that the second start is cheap."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import zlib
from pathlib import Path
from typing import Any

import jax

from fr_jax.data.download import cache_folder
from fr_jax.experiments._fields import SettingsError

__all__ = ["keep_compiled"]

LARGEST_BYTES = 4 * 2**30
LEAST_SECONDS = 0.1  # of compilation, for what is worth a file


def keep_compiled(folder: str) -> Path | None:
    """Makes JAX keep what it compiles, and look there first; returns the folder, or None if nothing is kept.

    ``folder`` is a path, ``"none"``, or ``"auto"``: a part of the user's cache folder for this kind of machine, or
    nothing (with a message) if that cannot be written. JAX's own settings win: ``JAX_COMPILATION_CACHE_DIR``,
    ``JAX_ENABLE_COMPILATION_CACHE=false``. In a run of several processes JAX lets process 0 alone write.

    Raises:
      SettingsError: the given folder cannot be made or written.
    """
    config: Any = jax.config
    if folder == "none" or not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir is None:
        path = cache_folder() / "compiled" / this_machine() if folder == "auto" else Path(folder).expanduser()
        if (why := _unusable(path)) is not None:
            if folder != "auto":
                raise SettingsError(
                    f"--compilation-cache {folder} cannot be written: {why}. Give another folder, or none."
                )
            print(f"fr_jax: what is compiled is not kept, {path}: {why}.", file=sys.stderr)
            return None
        config.update("jax_compilation_cache_dir", str(path))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ and importlib.util.find_spec("filelock"):
            config.update("jax_compilation_cache_max_size", LARGEST_BYTES)  # JAX needs filelock for a limit
    return Path(str(config.jax_compilation_cache_dir))


def _unusable(folder: Path) -> str | None:
    """Makes the folder; why it cannot be used, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error.strerror)
    return None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"


def this_machine() -> str:
    """A name for this kind of machine: code compiled for one CPU may not run on another with the same home folder."""
    features = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), features)
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
