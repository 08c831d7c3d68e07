import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr


@pytest.fixture(scope="session")
def naive() -> ModuleType:
    """The oracles of naive.py, which stands beside this file and is no package (pytest's import mode is importlib)."""
    spec = importlib.util.spec_from_file_location("naive", Path(__file__).with_name("naive.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sgd, adam = functools.cache(optax.sgd), functools.cache(optax.adam)


@pytest.fixture(scope="module", autouse=True)
def same_optimizers() -> Iterator[None]:
    """Equal optimizers are one, whose initialisation is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optax, "sgd", sgd)
        patch.setattr(optax, "adam", adam)
        yield


@pytest.fixture
def make_batches():
    """``(steps, examples=6) -> [Batch, ...]``, all different, in the default float type."""

    def make(steps: int, examples: int = 6) -> list[fr.Batch]:
        rng = np.random.default_rng(7)
        shapes = (examples, 3), (examples, 2)
        return [fr.Batch(*(jnp.asarray(rng.uniform(-1, 1, shape)) for shape in shapes)) for _ in range(steps)]

    return make


@pytest.fixture
def run():
    """``(algorithm, batches) -> (states, infos)``: the state before the first step and after each."""

    def run(algorithm: fr.Algorithm, batches: list[fr.Batch]):
        states, infos = [algorithm.init(jax.random.key(1), batches[0])], []
        for batch in batches:
            state, info = algorithm.step(states[-1], batch)
            states.append(state)
            infos.append(info)
        return states, infos

    return run


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list to which the name of everything that JAX traces, lowers or compiles is appended."""
    seen: list[str] = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event.startswith("/jax/core/compile/"):
            seen.append(f"{event} {kwargs.get('fun_name', '')}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at the value of a device array, or waits for it, fails."""

    def fail(*args: object, **kwargs: object) -> NoReturn:
        pytest.fail("something waited for a device")

    array = type(jnp.zeros(1))
    for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist", "block_until_ready"):
        monkeypatch.setattr(array, name, fail)
    monkeypatch.setattr(array, "_value", property(fail))
    for name in ("array", "asarray"):  # these read the buffer of an array on the CPU without asking the array
        convert = getattr(np, name)
        spy = lambda x, *args, convert=convert, **kwargs: (fail if isinstance(x, array) else convert)(
            x, *args, **kwargs
        )
        monkeypatch.setattr(np, name, spy)
    monkeypatch.setattr(jax, "block_until_ready", fail)
    monkeypatch.setattr(jax, "device_get", fail)
