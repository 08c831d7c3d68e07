"""PyTorch's training steps: back-propagation on one process, pipelines and data parallelism on a group of them.

Written as PyTorch's users are told to write them, with what is fastest on a CPU core: gradients set to None, fused
optimizers, gradients that are views of their buckets, statistics of batch normalisation that are not sent around.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Job",
    "Step",
    "backprop",
    "data_parallel",
    "layer_seconds",
    "pipeline",
    "trial",
]

Step = Callable[[], Any]
"""One update; returns the mean loss of what this process computed (a tensor), None if it computed no loss."""

OPTIMIZERS = {"sgd": ("SGD", {"lr": 0.01, "momentum": 0.9}), "adamw": ("AdamW", {"lr": 1e-3, "weight_decay": 1e-4})}
"""Name -> class of ``torch.optim`` and its settings, those of ``speed --optimizer``."""

SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}
"""Method -> class of ``torch.distributed.pipelining``."""


class Job(NamedTuple):
    """What all contestants train, and on what.

    Attributes:
      make: the network, a ``torch.nn.Sequential`` of layers.
      inputs: of a mini-batch, a tensor; images as ``(B, channels, height, width)``.
      targets: of a mini-batch, a tensor.
      optimizer: a name of :data:`OPTIMIZERS`.
      channels_last: how images lie in memory inside a stage; between stages they are contiguous, as gloo wants them.
    """

    make: Callable[[], Any]
    inputs: Any
    targets: Any
    optimizer: str
    channels_last: bool = False

    def layers(self) -> list[Any]:
        """New layers, with the same first weights at every call."""
        import torch

        torch.manual_seed(0)
        return list(self.make().train())

    def module(self, layers: Sequence[Any]) -> Any:
        """Some of the layers as one module."""
        import torch
        from torch import nn

        if not self.channels_last:
            return nn.Sequential(*layers)
        first, last = torch.contiguous_format, torch.channels_last
        return nn.Sequential(_format(first, last), *layers, _format(last, first)).to(memory_format=last)

    def optimizer_of(self, module: Any) -> Any:
        """A new optimizer of the module's weights."""
        import torch

        name, settings = OPTIMIZERS[self.optimizer]
        return getattr(torch.optim, name)(module.parameters(), fused=True, **settings)


def _format(before: Any, after: Any) -> Any:
    """A layer that changes how images lie in memory, and changes gradients back; other tensors are left alone."""
    import torch
    from torch import nn

    class Format(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.contiguous(memory_format=after)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0].contiguous(memory_format=before)

    class Layer(nn.Module):
        def forward(self, x: Any) -> Any:
            return Format.apply(x) if x.ndim == 4 else x

    return Layer()


def loss_fn(outputs: Any, targets: Any) -> Any:
    """The mean cross-entropy over images, or over all tokens of all windows."""
    from torch.nn import functional

    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def backprop(job: Job, microbatches: int) -> Step:
    """Plain back-propagation; gradients are added up over the micro-batches."""
    module = job.module(job.layers())
    optimizer = job.optimizer_of(module)
    parts = list(zip(job.inputs.chunk(microbatches), job.targets.chunk(microbatches), strict=True))

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for inputs, targets in parts:
            loss = loss_fn(module(inputs), targets) / microbatches
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    return step


def pipeline(job: Job, schedule: str, microbatches: int, cuts: Sequence[int]) -> Step:
    """A pipeline of ``torch.distributed.pipelining``; all processes of its group must call this, and the step.

    Args:
      job: what to train.
      schedule: one of :data:`SCHEDULES`.
      microbatches: number of parts of a mini-batch.
      cuts: K - 1 increasing places; stage k holds ``layers[cuts[k-1]:cuts[k]]``.
    """
    import torch
    from torch.distributed import pipelining

    k, K = torch.distributed.get_rank(), torch.distributed.get_world_size()
    bounds = [0, *cuts, None]
    module = job.module(job.layers()[bounds[k] : bounds[k + 1]])
    optimizer = job.optimizer_of(module)
    stage = pipelining.PipelineStage(module, k, K, torch.device("cpu"))
    run = getattr(pipelining, SCHEDULES[schedule])(stage, microbatches, loss_fn).step

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        losses: list[Any] = []
        if k < K - 1:
            run(*[job.inputs] * (k == 0))
        else:
            run(target=job.targets, losses=losses, return_outputs=False)
        optimizer.step()
        return torch.stack(losses).detach().mean() if losses else None

    return step


def data_parallel(job: Job) -> Step:
    """DistributedDataParallel: each process has an equal part of the mini-batch, with its own batch statistics."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    k, K = torch.distributed.get_rank(), torch.distributed.get_world_size()
    options = {"forward_sync_buffers": False, "gradient_as_bucket_view": True, "static_graph": True}
    module = DistributedDataParallel(job.module(job.layers()), **options)
    optimizer = job.optimizer_of(module)
    inputs, targets = job.inputs.chunk(K)[k], job.targets.chunk(K)[k]

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(module(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def trial(jobs: Mapping[str, Job], microbatches: int, rounds: int = 5) -> dict[str, float]:
    """Seconds of an update of back-propagation for each job: medians of turns, after a first update."""
    contestants = {name: backprop(job, microbatches) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(1 + rounds):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own[1:]) for name, own in seconds.items()}


def layer_seconds(job: Job, size: int, rounds: int = 5) -> list[float]:
    """What each layer takes for forward and backward pass of ``size`` examples: medians, in seconds."""
    import torch

    found, x = [], job.inputs[:size]
    for layer in job.layers():
        module, y, seconds = job.module([layer]), x, []
        for _ in range(rounds):
            x = x.detach().requires_grad_(x.is_floating_point() and bool(found))
            start = time.perf_counter()
            y = module(x)
            y.backward(torch.ones_like(y))
            seconds.append(time.perf_counter() - start)
        found.append(statistics.median(seconds))
        x = y
    return found
