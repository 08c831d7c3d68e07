import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The tests need no accelerator and must not occupy one. JAX_PLATFORMS=cuda,cpu in the environment still wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the tests' time is XLA's, compiling small functions for the CPU that run a few times. Without most of its
# optimisations, in one piece (32 by default) and with the emitters that JAX 0.10 can still choose (0.11 has no choice)
# a function takes a fifth of the time. To test optimised code: JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= pytest
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
# Where in the source each operation stands is looked up for every one, and nobody reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fr_jax.experiments._cli.devices import set_xla_flags

# As the programs do, whose numbers are compared with those of this process.
set_xla_flags()
# Before the first backend call: enough devices for K = 4 stages of two devices each.
jax.config.update("jax_num_cpu_devices", 8)
# The programs keep compiled code in the user's cache folder, which is none of the tests' business: see `compiled`.
jax.config.update("jax_enable_compilation_cache", False)
# Strict dtype promotion is not set beside it: optax.adam (decay ** count) and flax.linen.BatchNorm with
# dtype=bfloat16 raise under it (optax 0.2.8, flax 0.12.8).
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Makes float64 the default float for one test; arrays made before it stay as they are."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled(pytestconfig: pytest.Config) -> Path:
    """One compilation cache for all test processes, kept from run to run (``pytest --cache-clear`` empties it).

    ``JAX_COMPILATION_CACHE_DIR`` puts it elsewhere. Where one process reads what another is just writing, JAX warns and
    compiles (pyproject.toml lets that pass). What is taken from the cache is a compilation to JAX's events and to
    ``_cache_size`` all the same, so that tests which count compilations see it.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = Path(given) if given else pytestconfig.rootpath / ".pytest_cache" / "d" / "jax"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # which may have been opened, and found disabled, while tests were collected
    return folder


@pytest.fixture(scope="session", autouse=True)
def seldom_collection() -> None:
    """Garbage collection leaves out what was imported, and comes less often: tracing makes many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def program_env(compiled: Path) -> dict[str, str]:
    """The environment for tests that start a program: this checkout, the CPU, one compilation cache a session.

    The cache makes the second start of the same program cheap, and has what this process compiled.
    """
    root = Path(__file__).parents[1]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }


@pytest.fixture(scope="session")
def checksums() -> Callable[[Path], dict[str, Any]]:
    """``checksums(folder)``: kind and checksums, or value, of each leaf of the newest checkpoint, whatever its form."""
    import orbax.checkpoint as ocp

    from fr_jax.training.checkpoints import Checkpoints

    def checksums(folder: Path) -> dict[str, Any]:
        with Checkpoints(folder / "checkpoints") as checkpoints:
            leaves = checkpoints._read(checkpoints.steps()[-1], index=ocp.args.JsonRestore()).index["leaves"]
        crc = lambda entry: [part["crc32"] for part in entry.get("parts", [entry]) if "crc32" in part]
        return {name: [entry["kind"], entry.get("value"), crc(entry)] for name, entry in leaves.items()}

    return checksums
