"""Memory of each method by number of stages, from compiled code alone: ``python -m fr_jax.experiments.memory``.

Table 1 and figure 5 of the features replay paper. Nothing is run: each method's step is traced, its functions are
compiled for the backend in use, and their buffers are followed (``fr_jax.diagnostics.memory``). All methods have the
same cuts. Every row is compared with back-propagation on one device, the paper's BP.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from tqdm import tqdm

import fr_jax as fr
from fr_jax.diagnostics.memory.activations import closed_form, stage_activations
from fr_jax.diagnostics.memory.step_memory import MemoryReport, step_memory
from fr_jax.experiments._bench.contestants import shared_settings
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check_own, check_parts
from fr_jax.experiments._cli.devices import take_devices
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine, settings_of
from fr_jax.experiments._cli.per_method import MICROBATCHES_HELP, numbers_of_microbatches
from fr_jax.experiments._cli.results import check_folder, write_results
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import SettingsError, check_fields, documented, setting
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._models import example_inputs, random_batch
from fr_jax.experiments.memory.methods import CONTESTANTS
from fr_jax.experiments.memory.picture import figure
from fr_jax.plotting.style import png
from fr_jax.training.classification import cross_entropy
from fr_jax.types import Batch, Stage

__all__ = ["MemorySettings", "figure", "main", "measure", "table"]

FILES = ("memory.json", "memory.png")


@documented
@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """Compare the memory that methods need for one training step, by compiling it."""

    models: tuple[str, ...] = setting(("resnet20",), choices=tuple(fr.models.MODELS), series="distinct")
    """Names from fr_jax.models.MODELS."""
    K: tuple[int, ...] = setting((1, 2, 3, 4), least=1, series="increasing")
    """Numbers of stages; with K = 1 every method is back-propagation."""
    methods: tuple[str, ...] = setting(
        ("bp", "fr", "ddg", "recompute", "fr-one-device"),
        choices=tuple(CONTESTANTS),
        series="distinct",
        help=f"{', '.join(name for name in CONTESTANTS if name in METHODS)}, fr-stashed (features replay at stashed "
        "weights) and 1f1b (gpipe with that schedule) over K devices; on one device: fr-one-device (features replay), "
        "checkpoint (back-propagation with jax.checkpoint around each stage, which XLA undoes on a CPU), recompute "
        "(the same, each stage a function of its own).",
    )
    batch_size: int = setting(128, least=1)
    """Examples of a mini-batch of 32x32x3 images, or of windows of 128 bytes."""
    microbatches: tuple[str, ...] | None = setting(None, help=MICROBATCHES_HELP)
    output: Path | None = None
    """A folder for memory.json and memory.png; without it only the table is printed."""
    overwrite: bool = False
    """Replace the results that --output holds."""


def refusal(settings: MemorySettings) -> str | None:
    """What is wrong with the settings, or None."""
    check_fields(settings)
    for model in settings.models:
        if (L := len(fr.models.MODELS[model]())) < max(settings.K):
            return f"--K {max(settings.K)}: {model} has {L} layers, so K can be 1 to {L}."
    for method, M in contestants(settings):
        if method in METHODS:
            check_own(shared_settings(settings, microbatches=M), method, max(settings.K))
        elif M is not None:
            check_parts(settings.batch_size, M, method)
    return None


def contestants(settings: MemorySettings) -> list[tuple[str, int | None]]:
    """Each method with each of its numbers of micro-batches; None for its own."""
    splits = lambda method: CONTESTANTS[method].has_microbatches
    numbers = numbers_of_microbatches(settings.microbatches, settings.methods, splits)
    return [(method, M) for method in settings.methods for M in numbers.get(method, (None,))]


def measure(settings: MemorySettings) -> dict[str, Any]:
    """Compiles everything.

    Returns:
      Machine, date and versions, and ``"rows"``, one per model, K, method and ``microbatches``: bytes by kind as the
      sum over devices of their ``peak``; their sum ``total``, and ``activations`` alone; both over those of
      back-propagation on one device (``ratio``, ``activations_ratio``); ``table_1``, the latter by a closed form;
      ``devices``, ``stages`` and ``calls`` as :class:`fr_jax.diagnostics.memory.step_memory.MemoryReport` has them.
    """
    rows = []
    count = len(settings.models) * (1 + len(settings.K) * len(contestants(settings)))
    with tqdm(total=count, unit="method", file=sys.stdout, dynamic_ncols=True) as bar:
        for model in settings.models:
            rows += _measure_model(settings, model, bar)
    return {
        "settings": settings_of(settings),
        "optimizer": "SGD with momentum",
        **machine(),
        "backend": jax.devices()[0].device_kind,
        "rows": rows,
    }


def _measure_model(settings: MemorySettings, model: str, bar: tqdm) -> list[dict[str, Any]]:
    layers, analyses = fr.models.MODELS[model](), {}
    inputs = example_inputs(model, settings.batch_size)
    targets = random_batch(model, settings.batch_size).targets
    batch = Batch(inputs, jax.ShapeDtypeStruct(targets.shape, targets.dtype))  # type: ignore[arg-type]
    costs = fr.layer_costs(layers, inputs)

    def report(method: str, stages: Sequence[Stage], M: int | None) -> tuple[MemoryReport, float]:
        say = lambda function: bar.set_postfix_str(f"{model}, K = {len(stages)}, {method}: compiling {function}")
        one = CONTESTANTS[method].one_device
        placement = fr.placement(len(stages), jax.devices()[:1] if one else None)
        common: dict[str, Any] = {"placement": placement, "donate": True, "microbatches": M}
        algorithm = CONTESTANTS[method].make(stages, cross_entropy, optax.sgd(0.01, momentum=0.9), **common)
        start = time.perf_counter()
        found = step_memory(algorithm, batch, progress=say, analyses=analyses)
        bar.update()
        return found, time.perf_counter() - start

    # The yardstick of every row: the network as one function on one device.
    plain, plain_seconds = report("bp", fr.partition(layers, ()), None)
    rows = []
    for K in settings.K:
        cuts = fr.balance(costs, K)
        stages = fr.partition(layers, cuts)
        activations = stage_activations(stages, inputs)
        for method, given in contestants(settings):
            one = CONTESTANTS[method]
            M = one.microbatches(given)
            # With one stage most methods issue what the yardstick does, which is known.
            if K == M == 1 and not one.recomputes:
                found, seconds = plain, plain_seconds
                bar.update()
            else:
                found, seconds = report(method, stages, given)
            # Scaled to XLA's plan for the yardstick, which keeps less than JAX's VJPs store.
            form = closed_form(one.form, activations, whole=plain.activations, microbatches=M)
            row = {"model": model, "K": K, "method": method, "microbatches": M, "cuts": list(cuts), "seconds": seconds}
            rows.append(row | _numbers(found, plain, form))
    return rows


def _numbers(found: MemoryReport, plain: MemoryReport, form: float | None) -> dict[str, Any]:
    kinds = found.devices[0].peak
    return {
        "total": found.total,
        "activations": found.activations,
        "largest_device": max(device.total for device in found.devices),
        "ratio": found.total / plain.total,
        "activations_ratio": found.activations / plain.activations,
        "table_1": None if form is None else form / plain.activations,
        "peak": {kind: sum(device.peak[kind] for device in found.devices) for kind in kinds},
        "devices": [device._asdict() for device in found.devices],
        "stages": [stage._asdict() for stage in found.stages],
        "calls": [call._asdict() for call in found.calls],
    }


def table(result: dict[str, Any]) -> str:
    """The result as text, in MB (10^6 bytes)."""
    head = (
        "model",
        "method",
        "K",
        "M",
        "total",
        "ratio",
        "activations",
        "ratio",
        "table 1",
        "history",
        "largest device",
    )
    body = [
        (
            row["model"],
            row["method"],
            row["K"],
            row["microbatches"],
            f"{row['total'] / 1e6:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['activations'] / 1e6:.1f}",
            f"{row['activations_ratio']:.2f}",
            "-" if row["table_1"] is None else f"{row['table_1']:.2f}",
            f"{row['peak']['history'] / 1e6:.1f}",
            f"{row['largest_device'] / 1e6:.1f}",
        )
        for row in result["rows"]
    ]
    title = (
        f"batch {result['settings']['batch_size']}, {result['optimizer']}; MB, sums over devices of their peaks; "
        "ratios to back-propagation on one device"
    )
    return f"{title}\n\n{text_table(head, body, left=2)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments."""
    return harness.main("memory", MemorySettings(), run, arguments)


def run(settings: MemorySettings) -> int:
    """Compiles everything, prints the table and writes the files; returns the exit code.

    Raises:
      SettingsError: a setting cannot be used.
    """
    if problem := refusal(settings):
        raise SettingsError(problem)
    one_process("memory compiles in one process for all devices.")
    check_folder(settings.output, FILES, overwrite=settings.overwrite)
    spread = [name for name in settings.methods if not CONTESTANTS[name].one_device]
    alone = [name for name, method in CONTESTANTS.items() if method.one_device]
    instead = f"leave {', '.join(spread)} out of --methods (of one device are {', '.join(alone)}), "
    # Nothing runs, but buffers are counted on the devices for which the functions are compiled.
    take_devices(max(settings.K) if spread else 1, each=True, instead=instead)
    result = measure(settings)
    print(table(result), flush=True)
    if settings.output is not None:
        return write_results(settings.output, dict(zip(FILES, (result, png(figure(result))), strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
