"""Images a second on one device, beside PyTorch: ``python -m fr_jax.experiments.throughput --models resnet18``.

For every network and number format, side by side: one jitted function with value_and_grad and an optax update, the
methods of this library with all their stages on the same device, and the same network in PyTorch, channels last and
compiled, in a process of its own. What is compiled is compiled at the same time; then all take turns.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import fr_jax as fr
from fr_jax.experiments._bench.contestants import Entry, make_batch, make_entry, method_settings, plain, shared_settings
from fr_jax.experiments._bench.turns import TakesTurns, as_rows, in_turns, quietly
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check_own
from fr_jax.experiments._cli.devices import set_xla_flags
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine
from fr_jax.experiments._cli.results import check_file, write_beside
from fr_jax.experiments._cli.settings import SharedSettings, own_of_method
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import SettingsError, check_fields, setting
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._models import example_inputs
from fr_jax.experiments._run.cuts import network_costs, stage_costs
from fr_jax.experiments.throughput import pytorch_peer
from fr_jax.experiments.throughput.picture import throughput_figure
from fr_jax.experiments.throughput.pytorch_peer import Peer, PeerError
from fr_jax.plotting.style import png
from fr_jax.types import Stage

__all__ = ["ThroughputSettings", "main", "run"]

PLAIN = "plain jitted optax step"
DTYPES = ("float32", "bfloat16")
WARM_UP = 4
AT_ONCE = 8
"""Networks that are compiled at the same time."""


@dataclasses.dataclass(frozen=True)
class ThroughputSettings:
    """Time a training step on one device: one jitted function, this library's methods, and PyTorch."""

    models: tuple[str, ...] = setting(("resnet18", "resnet164"), choices=tuple(fr.models.MODELS), series="distinct")
    """Names from fr_jax.models.MODELS."""
    dtypes: tuple[str, ...] = setting(DTYPES, choices=DTYPES, series="distinct")
    """Of the computation: float32 (with TF32 matrix units, where the device has them), bfloat16."""
    methods: tuple[str, ...] = setting(("bp", "fr"), choices=tuple(METHODS))
    """Methods of this library to time; bp as one stage, the others with K stages on the same device."""
    K: int = setting(4, least=1)
    """Stages."""
    batch_size: int = setting(128, least=1)
    """Examples of a mini-batch of 32x32x3 images (random numbers; only shapes matter here)."""
    microbatches: int | None = setting(None, least=1)
    """Of every method that has micro-batches. Default: each method's own, which is 1 but for gpipe and 2bw."""
    pytorch: tuple[str, ...] = setting(("default", "reduce-overhead"), choices=(*pytorch_peer.MODES, "none"))
    """Modes of torch.compile to time, max-autotune and eager (not compiled) among them; or none."""
    patience: float = setting(900.0, above=0)
    """Seconds from the start after which PyTorch's compilation is given up."""
    rounds: int = setting(7, least=1)
    """How many times each contestant has its turn."""
    steps: int = setting(20, least=1)
    """Steps of a turn."""
    output: Path | None = None
    """A JSON file for the numbers; the picture gets its name with .png."""
    overwrite: bool = False
    """Replace these files where they exist."""


def check(settings: ThroughputSettings) -> None:
    """Raises SettingsError for the first setting that cannot be used."""
    check_fields(settings)
    for method in settings.methods:
        check_own(shared_settings(settings), method, 1 if method == "bp" else settings.K)
    if modes(settings):
        pytorch_peer.check_pytorch(settings.models)
    one_process("throughput times one device from one process.")
    check_file(settings.output, overwrite=settings.overwrite)


def modes(settings: ThroughputSettings) -> list[str]:
    """PyTorch's contestants."""
    return [mode for mode in dict.fromkeys(settings.pytorch) if mode != "none"]


@contextmanager
def peers_of(settings: ThroughputSettings) -> Iterator[dict[tuple[str, str], list[Peer]]]:
    """PyTorch's processes, by network and dtype, already compiling; they end with the block."""
    started: dict[tuple[str, str], list[Peer]] = {}
    try:
        for model, dtype in itertools.product(settings.models, settings.dtypes):
            own = started.setdefault((model, dtype), [])
            own += [pytorch_peer.start(model, dtype, settings.batch_size, mode) for mode in modes(settings)]
        yield started
    finally:
        for peer in itertools.chain(*started.values()):
            peer.end()


def makers_of(settings: ThroughputSettings, model: str, dtype: str) -> list[Callable[[], Entry]]:
    """JAX's contestants for one network, each made and compiled by a call."""
    layers: list[Stage] = fr.models.MODELS[model](dtype=jnp.dtype(dtype))
    shared = shared_settings(settings, model=model, dtype=dtype)
    one = jax.devices()[:1]

    def of_method(method: str) -> Entry:
        K = 1 if method == "bp" else settings.K
        name = METHODS[method].titled(own_of_method(shared, method), "" if K == 1 else f", K = {K} on it")
        return make_entry(shared, layers, method, K, name=name, devices=one)

    def compiled(make: Callable[[], Entry]) -> Entry:
        entry = make()
        # Stages begin to update up to K-1 steps late: only then is everything compiled.
        contestant, _ = entry.contestant.take_turn(2 * settings.K + 1)
        quietly(f"compiled: {model}, {dtype}, {entry.contestant.name}")
        return entry._replace(contestant=contestant)

    batch = make_batch(model, settings.batch_size, fr.placement(1, one)[0])
    made = [lambda: plain(layers, batch), *(lambda method=method: of_method(method) for method in settings.methods)]
    return [lambda make=make: compiled(make) for make in made]


def work_of(settings: ThroughputSettings, model: str, entry: Entry) -> float | None:
    """Operations of a method's step, in those of back-propagation; None where they were not counted."""
    if entry.method not in METHODS or not entry.cuts:
        return 1.0
    layers = fr.models.MODELS[model]()
    example = example_inputs(model, settings.batch_size)
    shared = SharedSettings(model=model, batch_size=settings.batch_size)
    own, whole = (method_settings(shared, method, settings.K, entry.cuts) for method in (entry.method, "bp"))
    costs = network_costs(own, layers, example)
    return sum(stage_costs(own, costs, entry.cuts)) / sum(stage_costs(whole, costs, entry.cuts))


def measure(settings: ThroughputSettings, keep: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Makes and compiles all contestants, and lets those of one network and dtype take turns.

    ``keep`` is given the result so far after each network: if a long measurement is cut off, what it found is kept.
    """
    networks = list(itertools.product(settings.models, settings.dtypes))
    names = ("batch_size", "K", "rounds", "steps")
    result = {name: getattr(settings, name) for name in names} | machine()
    result |= {"pytorch": {}, "failures": {}, "results": []}
    # Threads are enough for JAX's contestants: XLA compiles without Python's lock.
    with peers_of(settings) as peers, ThreadPoolExecutor(AT_ONCE) as pool:
        deadline = time.monotonic() + settings.patience
        coming = {one: [pool.submit(make) for make in makers_of(settings, *one)] for one in networks}
        made = {one: [entry.result() for entry in own] for one, own in coming.items()}
        ready = {one: ready_of(one, peers[one], deadline, result) for one in networks}
        for one in networks:  # nothing is compiled any more
            model, dtype = one
            quietly(f"{model}, {dtype}")
            field: list[TakesTurns] = [*(entry.contestant for entry in made[one]), *ready[one]]
            turns = in_turns(field, rounds=settings.rounds, steps=settings.steps, warm_up=WARM_UP, log=quietly)
            work = {entry.contestant.name: work_of(settings, model, entry) for entry in made[one]}
            result["results"] += rows_of(settings, model, dtype, as_rows(turns), work)
            keep(result)
    return result


def ready_of(network: tuple[str, str], peers: Sequence[Peer], deadline: float, result: dict[str, Any]) -> list[Peer]:
    """Those of a network's PyTorch processes that are ready in time; ``result`` says why others are not."""
    ready = []
    for peer in peers:
        try:
            ready.append(peer.ready(deadline - time.monotonic()))
            result["pytorch"] = ready[-1].about
        except PeerError as error:
            peer.end()
            quietly(f"{', '.join(network)}: {error}")
            result["failures"][", ".join([*network, peer.name])] = str(error)
    return ready


def rows_of(
    settings: ThroughputSettings, model: str, dtype: str, found: dict[str, dict[str, Any]], work: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one network and dtype, with images a second and what they are relative to the plain step."""
    base = found[PLAIN]["seconds_median"]
    return [
        {
            "model": model,
            "dtype": dtype,
            "contestant": name,
            "images_per_s": settings.batch_size / row["seconds_median"],
            "times_plain": base / row["seconds_median"],
            "operations": work.get(name),
            **row,
        }
        for name, row in found.items()
    ]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = f"one device of {result['machine']}, mini-batch {result['batch_size']}, jax {result['jax']}"
    torch = "".join(f", {name} {value}" for name, value in result["pytorch"].items())
    lines = [head + torch, "operations: of a step, in those of back-propagation; host: ms to issue a step", ""]
    body = [
        (
            f"{row['model']}, {row['dtype']}, {row['contestant']}",
            f"{row['images_per_s']:,.0f}",
            *(f"{row[f'seconds_{of}'] * 1e3:.2f}" for of in ("median", "min", "max")),
            f"{row['times_plain']:.2f}",
            "-" if row["operations"] is None else f"{row['operations']:.3f}",
            f"{row['host_seconds_median'] * 1e3:.2f}",
        )
        for row in result["results"]
    ]
    lines.append(text_table(("", "images/s", "ms/step", "min", "max", "x plain", "operations", "host"), body))
    lines += [f"not timed: {name}: {why}" for name, why in result["failures"].items()]
    return "\n".join(lines)


def run(settings: ThroughputSettings) -> dict[str, Any]:
    """Measures, and prints, writes and draws the result.

    Raises:
      SettingsError: a setting cannot be used, or PyTorch is missing.
    """
    check(settings)
    set_xla_flags()
    # Where a GPU is shared with PyTorch's processes, JAX must not take three quarters of it at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def keep(result: dict[str, Any]) -> None:
        if settings.output is not None:
            write_beside(settings.output, result, png(throughput_figure(result)))

    try:
        result = measure(settings, keep)
    except ValueError as error:  # of the library, whose messages fit the flags
        raise SettingsError(str(error)) from error
    print(table(result), flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 where PyTorch's process dies or a disk is full, 2 for bad arguments."""
    return harness.main("throughput", ThroughputSettings(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
