"""Times one step of each method, side by side: ``python -m fr_jax.experiments.speed --K 2 --pinned``.

Contestants take turns, round after round, so that a slow minute of the machine hits all of them; medians and ratios
are reported. With ``--pinned`` each stage is a process of its own on a core of its own (``jax.distributed``), the only
way to make one CPU device one core; without it all stages are devices of this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import fr_jax as fr
from fr_jax.training.classification import cross_entropy
from fr_jax.training.metrics import write_json
from fr_jax.types import Algorithm, Array, Batch, Stage

__all__ = ["SpeedSettings", "main", "run"]


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """Time one training step of a plain jitted optax step, back-propagation and features replay, side by side."""

    K: int = 2
    """Stages of features replay, and of back-propagation across devices."""
    model: str = "resnet20"
    """A name from fr_jax.models.MODELS."""
    batch_size: int = 128
    """Examples of a mini-batch of 32x32x3 images (random numbers; only shapes matter here)."""
    rounds: int = 9
    """How many times each contestant has its turn."""
    steps: int = 8
    """Steps of a turn."""
    cuts: tuple[int, ...] | None = None
    """Explicit cuts; by default fr_jax.balance chooses them from measured times."""
    pinned: bool = False
    """One process a stage, each pinned to one core."""
    output: Path | None = None
    """A JSON file for the numbers."""
    process_id: int | None = None
    """Set by --pinned in the processes that it starts."""
    coordinator: str | None = None
    """Set by --pinned in the processes that it starts: HOST:PORT."""


class Contestant(NamedTuple):
    """Something to time: ``run(carry) -> (carry, loss)`` is one training step."""

    name: str
    run: Callable[[Any], tuple[Any, Array]]
    carry: Any


def plain_step(layers: Sequence[Stage], optimizer: optax.GradientTransformation, batch: Batch) -> Contestant:
    """What one writes without this library: a jitted function with value_and_grad and an optax update."""
    network = fr.chain(*layers)

    def loss_fn(params: Any, model_state: Any, batch: Batch) -> tuple[Array, Any]:
        outputs, model_state = network.apply(params, model_state, batch.inputs, train=True)
        return cross_entropy(outputs, batch.targets), model_state

    def step(carry: tuple, batch: Batch) -> tuple[tuple, Array]:
        params, model_state, opt_state = carry
        (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, model_state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), model_state, opt_state), loss

    def init(key: Array) -> tuple:
        params, model_state = network.init(key, jnp.zeros(batch.inputs.shape))
        return params, model_state, optimizer.init(params)

    jitted = jax.jit(step, donate_argnums=0)
    here = batch.inputs.sharding
    carry = jax.jit(init, out_shardings=here)(jax.random.key(0))
    return Contestant("plain jitted optax step", lambda carry: jitted(carry, batch), carry)


def contestant(name: str, algorithm: Algorithm, batch: Batch) -> Contestant:
    """A method of this library."""

    def run(state: Any) -> tuple[Any, Array]:
        state, info = algorithm.step(state, batch)
        return state, info.loss

    return Contestant(name, run, algorithm.init(jax.random.key(0), batch))


def make_contestants(settings: SpeedSettings) -> tuple[list[Contestant], tuple[int, ...]]:
    """The four of them, and the cuts."""
    K, first, spread = settings.K, fr.placement(1), fr.placement(settings.K)
    layers = fr.models.MODELS[settings.model]()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((settings.batch_size, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, settings.batch_size).astype(np.int32)
    # jit places an array on a device of another process, where device_put refuses.
    batch = Batch(*jax.jit(lambda *arrays: arrays, out_shardings=first[0])(images, labels))
    cuts = settings.cuts
    if cuts is None:
        costs = np.asarray(fr.layer_costs(layers, batch.inputs, "time", repeats=9))
        cuts = fr.balance(_from_first_process(costs).tolist(), K, last_stage_weight=3 / 4)
    optimizer = optax.sgd(0.01, momentum=0.9)
    whole, stages = fr.partition(layers, ()), fr.partition(layers, cuts)
    methods = [
        ("back-propagation, 1 device", fr.backprop, whole, first),
        ("features replay, K = 1", fr.features_replay, whole, first),
        (f"back-propagation, {K} devices", fr.backprop, stages, spread),
        (f"features replay, K = {K}", fr.features_replay, stages, spread),
    ]
    made = [
        contestant(name, method(parts, cross_entropy, optimizer, placement=places, donate=True), batch)
        for name, method, parts, places in methods
    ]
    return [plain_step(layers, optimizer, batch), *made], tuple(cuts)


def _from_first_process(array: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array


def _meet() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("speed")


def turn(one: Contestant, steps: int) -> tuple[Contestant, float]:
    """Seconds a step, from all processes idle to all processes idle."""
    _meet()
    start = time.perf_counter()
    carry, loss = one.carry, None
    for _ in range(steps):
        carry, loss = one.run(carry)
    mine = [x for x in jax.tree.leaves((carry, loss)) if isinstance(x, jax.Array) and x.is_fully_addressable]
    jax.block_until_ready(mine)
    _meet()
    return one._replace(carry=carry), (time.perf_counter() - start) / steps


def measure(settings: SpeedSettings) -> dict[str, Any]:
    """Warm-up, then interleaved rounds."""
    contestants, cuts = make_contestants(settings)
    seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
    for i, one in enumerate(contestants):
        contestants[i], _ = turn(one, 2 * settings.K + 1)
    for _ in range(settings.rounds):
        for i, one in enumerate(contestants):
            contestants[i], spent = turn(one, settings.steps)
            seconds[one.name].append(spent)
    baseline = statistics.median(seconds["back-propagation, 1 device"])
    rows = {name: _statistics(times, baseline) for name, times in seconds.items()}
    return {
        "model": settings.model,
        "batch_size": settings.batch_size,
        "K": settings.K,
        "cuts": list(cuts),
        "bound_of_features_replay": (3 * settings.K + 1) / 4,
        "placement": "one pinned process a stage" if settings.pinned else "devices of one process",
        "rounds": settings.rounds,
        "steps_per_round": settings.steps,
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}",
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "results": rows,
    }


def _statistics(times: list[float], baseline: float) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "seconds_median": median,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "speedup_over_back_propagation_on_1_device": baseline / median,
        "rounds": times,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['model']}, batch {result['batch_size']}, cuts {result['cuts']}, {result['placement']}", ""]
    lines.append(f"{'':<28} {'s/step':>8} {'min':>7} {'max':>7} {'speedup':>8}")
    for name, row in result["results"].items():
        numbers = (row["seconds_median"], row["seconds_min"], row["seconds_max"])
        speedup = row["speedup_over_back_propagation_on_1_device"]
        lines.append(f"{name:<28} {numbers[0]:>8.4f} {numbers[1]:>7.4f} {numbers[2]:>7.4f} {speedup:>8.2f}")
    lines.append(f"bound for features replay at K = {result['K']}: {result['bound_of_features_replay']:.2f}")
    return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(settings: SpeedSettings) -> None:
    """Makes this process one of the group, on a core of its own; before anything else is asked of JAX."""
    assert settings.process_id is not None and settings.coordinator is not None
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[settings.process_id % len(cores)]})
    host = settings.coordinator.rpartition(":")[0]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cross_host_transfer_socket_address", f"{host}:{_free_port()}")
    jax.config.update("jax_cross_host_transport_addresses", ",".join([f"{host}:0"] * 4))
    jax.distributed.initialize(settings.coordinator, settings.K, settings.process_id)


def _start_group(settings: SpeedSettings, arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "fr_jax.experiments.speed", *arguments, "--coordinator"]
    command.append(f"127.0.0.1:{_free_port()}")
    group = [subprocess.Popen([*command, "--process-id", str(k)]) for k in range(settings.K)]
    try:
        while any(process.poll() is None for process in group):
            if any(process.returncode for process in group):
                print("fr_jax: a process of the group failed; ending the others.", file=sys.stderr)
                return 1
            time.sleep(0.2)
        return int(any(process.returncode for process in group))
    finally:
        for process in group:
            process.kill()


def run(settings: SpeedSettings) -> dict[str, Any]:
    """Measures in this process (or as one of a group), and prints and writes what the first process saw."""
    if settings.process_id is not None:
        _join(settings)
    else:
        with contextlib.suppress(RuntimeError):  # JAX is in use already: take the devices that there are
            jax.config.update("jax_num_cpu_devices", settings.K)
    result = measure(settings)
    if jax.process_index() == 0:
        print(table(result), flush=True)
        if settings.output is not None:
            write_json(settings.output, result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code."""
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    settings = tyro.cli(SpeedSettings, args=arguments, prog="python -m fr_jax.experiments.speed")
    if settings.pinned and settings.process_id is None:
        cores = len(os.sched_getaffinity(0))
        if cores < settings.K:
            print(
                f"fr_jax: --pinned needs {settings.K} cores for --K {settings.K}; there are {cores}.", file=sys.stderr
            )
            return 2
        return _start_group(settings, arguments)
    run(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
