"""Times PyTorch's pipelines and data parallelism: ``python -m fr_jax.experiments.pytorch_peers --K 2 --pinned``.

Networks, mini-batches, optimizers, cores and the way of taking turns are those of ``speed --pinned``, so that seconds
can be compared. Contestants: back-propagation on one process, GPipe and 1F1B of ``torch.distributed.pipelining`` with
every number of micro-batches at several cuts, and DistributedDataParallel; processes talk through gloo.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fr_jax as fr
from fr_jax._files import write_json
from fr_jax.distributed import free_port, group, is_first
from fr_jax.experiments._bench.pinned import cores_by_process, placed_on, start_processes
from fr_jax.experiments._bench.pytorch_networks import NETWORKS, gpt, network
from fr_jax.experiments._bench.turns import Contestant, as_rows, in_turns, quietly
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.checks import check_cuts, check_parts
from fr_jax.experiments._cli.machine import machine
from fr_jax.experiments._cli.results import check_file
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import SettingsError, check_fields, setting
from fr_jax.experiments.pytorch_peers import steps
from fr_jax.experiments.pytorch_peers.steps import OPTIMIZERS, SCHEDULES, Job, Step

__all__ = ["PeersSettings", "main", "run"]

METHODS = ("bp", *SCHEDULES, "ddp")
TITLES = {"bp": "back-propagation", "gpipe": "GPipe", "1f1b": "1F1B", "ddp": "DistributedDataParallel"}
IMAGES, CLASSES = (3, 32, 32), 10
WARM_UP = 2  # the first step of a pipeline tells its processes the shapes


@dataclasses.dataclass(frozen=True)
class PeersSettings:
    """Time one training step of PyTorch's pipelines and data parallelism, with K processes on this machine's CPU."""

    K: int = setting(2, least=2)
    """Stages, and processes of data parallelism."""
    methods: tuple[str, ...] = setting(METHODS, choices=METHODS, series="distinct")
    """bp (back-propagation on one process), gpipe, 1f1b, ddp (DistributedDataParallel)."""
    microbatches: tuple[int, ...] = setting((2, 4, 8), least=1, series="distinct")
    """Numbers of micro-batches, each of which is timed; of bp also 1."""
    model: str = setting("resnet20", choices=(*NETWORKS, "gpt"))
    """A residual network, or gpt."""
    depth: int = setting(8, least=1)
    """Blocks of the gpt."""
    width: int = setting(64, least=1)
    """Features of the gpt."""
    heads: int = setting(4, least=1)
    """Heads of the gpt's attention."""
    context: int = setting(64, least=1)
    """Bytes that the gpt sees."""
    batch_size: int | None = setting(None, least=1)
    """Examples of a mini-batch: of 32x32x3 images, 128 by default; of windows of text, 16 (random numbers)."""
    optimizer: str | None = setting(None, choices=tuple(OPTIMIZERS))
    """sgd (with momentum; the default for images) or adamw (the default for gpt)."""
    cuts: tuple[int, ...] | None = None
    """Explicit cuts. Default: those that balance the layers' times, and those with one boundary a layer off."""
    rounds: int = setting(7, least=1)
    """How many times each contestant has its turn."""
    steps: int = setting(2, least=1)
    """Steps of a turn."""
    pinned: bool = False
    """Each process on a core of its own, as speed --pinned; otherwise they share all cores."""
    output: Path | None = None
    """A JSON file for the numbers."""
    overwrite: bool = False
    """Replace it where it exists."""


class Entry(NamedTuple):
    """A contestant: its name in the table, what it is, and its step."""

    name: str
    method: str
    microbatches: int
    cuts: tuple[int, ...]
    step: Step


def check(settings: PeersSettings) -> None:
    """Raises SettingsError for the first setting that cannot be used, and where PyTorch is missing."""
    check_fields(settings)
    check_cuts(settings.cuts, settings.K)
    for M in settings.microbatches:
        check_parts(batch_size(settings), M, f"--microbatches {M}")
    if "ddp" in settings.methods:
        check_parts(batch_size(settings), settings.K, "ddp")
    if "1f1b" in settings.methods and min(settings.microbatches) < settings.K:
        raise SettingsError(
            f"--microbatches {min(settings.microbatches)} are too few for the --K {settings.K} stages of 1f1b; PyTorch "
            f"asks for {settings.K} or more. Give more, or leave 1f1b out of --methods."
        )
    if settings.model == "gpt" and settings.width % (2 * settings.heads):
        raise SettingsError(
            f"--width {settings.width} cannot be split into --heads {settings.heads} of even width; use a multiple of "
            f"{2 * settings.heads}."
        )
    if importlib.util.find_spec("torch") is None:
        raise SettingsError(
            "pytorch_peers needs PyTorch, which is not installed here. Install it: pip install 'fr_jax[pytorch]'."
        )
    check_file(settings.output, overwrite=settings.overwrite, picture=False)


def batch_size(settings: PeersSettings) -> int:
    """Examples of a mini-batch."""
    return settings.batch_size or (16 if settings.model == "gpt" else 128)


def make_job(settings: PeersSettings) -> Job:
    """The network, and a random mini-batch."""
    import torch

    rng, size = np.random.default_rng(0), batch_size(settings)
    if settings.model == "gpt":
        text = torch.from_numpy(rng.integers(0, 256, (size, settings.context + 1)))
        sizes = {"depth": settings.depth, "width": settings.width, "heads": settings.heads}
        return Job(lambda: gpt(**sizes), text[:, :-1], text[:, 1:], settings.optimizer or "adamw")
    images = torch.from_numpy(rng.standard_normal((size, *IMAGES)).astype(np.float32))
    targets = torch.from_numpy(rng.integers(0, CLASSES, size))
    return Job(lambda: network(settings.model, CLASSES), images, targets, settings.optimizer or "sgd")


def fastest(settings: PeersSettings, job: Job) -> tuple[Job, dict[str, float]]:
    """The job with the layout of images in which the first process trains fastest, and the seconds of each."""
    if settings.model not in NETWORKS:
        return job, {}
    jobs = {"contiguous": job, "channels last": job._replace(channels_last=True)}
    quietly("layouts of images")
    tried = group().from_first(lambda: steps.trial(jobs, max(settings.microbatches)))
    return jobs[min(tried, key=tried.__getitem__)], tried


def cuts_to_try(settings: PeersSettings, job: Job) -> list[tuple[int, ...]]:
    """The given cuts; or those that balance the layers' times, and those with one boundary a layer off.

    Raises:
      SettingsError: the network has no such cuts.
    """
    L, K = len(job.layers()), settings.K
    if settings.cuts is not None:
        tried = [settings.cuts]
    else:
        examples = max(1, batch_size(settings) // max(settings.microbatches))
        quietly("times of the layers")
        best = fr.balance(group().from_first(lambda: steps.layer_seconds(job, examples)), K)
        off = [best[:i] + (best[i] + by,) + best[i + 1 :] for i in range(K - 1) for by in (-1, 1)]
        tried = sorted([best, *off])
    found = [cuts for cuts in tried if all(a < b for a, b in zip((0, *cuts), (*cuts, L), strict=True))]
    if not found:
        raise SettingsError(
            f"--cuts {' '.join(map(str, settings.cuts or ()))} must be increasing places between the {L} layers of "
            f"--model {settings.model}: from 1 to {L - 1}."
        )
    return found


def make_entries(settings: PeersSettings, job: Job) -> list[Entry]:
    """All contestants, in the order of the table."""
    entries, K = [], settings.K
    for M in dict.fromkeys((1, *settings.microbatches)) if "bp" in settings.methods else ():
        # The others wait for the first process without using their cores.
        step = steps.backprop(job, M) if is_first() else lambda: None
        entries.append(Entry(f"{TITLES['bp']}, 1 process, M = {M}", "bp", M, (), step))
    schedules = [method for method in settings.methods if method in SCHEDULES]
    tried = cuts_to_try(settings, job) if schedules else []
    for method in schedules:
        for M in settings.microbatches:
            for cuts in tried:
                name = f"{TITLES[method]}, K = {K}, M = {M}, cut {','.join(map(str, cuts))}"
                entries.append(Entry(name, method, M, cuts, steps.pipeline(job, method, M, cuts)))
    if "ddp" in settings.methods:
        entries.append(Entry(f"{TITLES['ddp']}, {K} processes", "ddp", 1, (), steps.data_parallel(job)))
    return entries


def measure(settings: PeersSettings) -> dict[str, Any]:
    """Joins the processes, makes all contestants, and times them."""
    import torch

    shared = {"placement": f"{settings.K} processes that share cores", "cores_by_process": cores_by_process()}
    placed = placed_on(True, settings.K) if settings.pinned else shared
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{group().from_first(free_port)}"
    torch.distributed.init_process_group("gloo", address, rank=group().index, world_size=settings.K)
    job, tried = fastest(settings, make_job(settings))
    entries, losses = make_entries(settings, job), {}

    def contestant(entry: Entry) -> Contestant:
        def run(carry: None) -> Any:
            losses[entry.name] = entry.step()
            return carry, None

        return Contestant(entry.name, run, None)

    field = [contestant(entry) for entry in entries]
    turns = in_turns(field, rounds=settings.rounds, steps=settings.steps, warm_up=WARM_UP, log=quietly)
    rows = rows_of(entries, as_rows(turns), losses)
    torch.distributed.destroy_process_group()
    sizes = ("depth", "width", "heads", "context") if settings.model == "gpt" else ()
    return {
        "model": settings.model,
        **{name: getattr(settings, name) for name in sizes},
        "parameters": sum(weights.numel() for layer in job.layers() for weights in layer.parameters()),
        "batch_size": batch_size(settings),
        "optimizer": job.optimizer,
        "channels_last": job.channels_last,
        "layout_seconds": tried,
        "K": settings.K,
        **placed,
        "rounds": settings.rounds,
        "steps_per_round": settings.steps,
        **machine("torch"),
        "results": rows,
    }


def rows_of(
    entries: Sequence[Entry], rows: dict[str, dict[str, Any]], losses: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What was timed, with what it is, the loss of its last step, and whether its cuts are the best that were tried."""
    of_all = group().exchange([None if losses[one.name] is None else float(losses[one.name]) for one in entries])
    best: dict[tuple[str, int], Entry] = {}
    for entry, seen in zip(entries, zip(*of_all, strict=True), strict=True):
        row, known = rows[entry.name], [loss for loss in seen if loss is not None]
        row |= {"method": entry.method, "microbatches": entry.microbatches, "cuts": list(entry.cuts)}
        row["loss"] = sum(known) / len(known)  # the same for the same M: the schedules do the same work
        other = best.setdefault((entry.method, entry.microbatches), entry)
        if row["seconds_median"] < rows[other.name]["seconds_median"]:
            best[entry.method, entry.microbatches] = entry
    for entry in entries:
        rows[entry.name]["best_cuts"] = best[entry.method, entry.microbatches] is entry
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as text; ``*`` marks the best of the cuts that were tried."""
    how = ", channels last" * result["channels_last"]
    head = (
        f"{result['model']}, batch {result['batch_size']}, {result['optimizer']}, PyTorch {result['torch']}{how}, "
        f"K = {result['K']}, {result['placement']}"
    )
    body = [
        (
            f"{name} {'*' if row['cuts'] and row['best_cuts'] else ''}",
            *(f"{row[f'seconds_{of}']:.4f}" for of in ("median", "min", "max")),
            "/".join(f"{one / row['seconds_median']:.0%}" for one in row["busy_seconds_median_by_process"]),
            f"{row['loss']:.4f}",
        )
        for name, row in result["results"].items()
    ]
    return f"{head}\n\n" + text_table(("", "s/step", "min", "max", "busy", "loss"), body)


def run(settings: PeersSettings) -> dict[str, Any]:
    """Measures as one of K processes, and prints and writes what the first one saw.

    Raises:
      SettingsError: a setting cannot be used, PyTorch is missing, or this is not one of K processes.
    """
    check(settings)
    if group().size != settings.K:
        raise SettingsError(
            f"pytorch_peers with --K {settings.K} runs in {settings.K} processes, and this is one of {group().size}. "
            "Start it without fr_jax.launch: it starts them itself."
        )
    result = measure(settings)
    if is_first():
        print(table(result), flush=True)
        if settings.output is not None:
            write_json(settings.output, result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments or without PyTorch."""

    def work(settings: PeersSettings) -> Any:
        check(settings)  # before other processes start, which would each refuse
        code = start_processes("pytorch_peers", PeersSettings(), settings)
        return run(settings) if code is None else code

    return harness.main("pytorch_peers", PeersSettings(), work, arguments)


if __name__ == "__main__":
    sys.exit(main())
