"""Seconds and memory of a step of each recipe on K devices: simulated from parts that are measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fr_jax as fr
from fr_jax.diagnostics.memory.step_memory import step_memory
from fr_jax.diagnostics.profiling.stage_times import median, stage_timer
from fr_jax.diagnostics.simulation.timeline import simulate, summarise
from fr_jax.diagnostics.simulation.times import Times, ring_all_reduce_seconds
from fr_jax.experiments._bench.contestants import OPTIMIZERS
from fr_jax.experiments._methods import DATA_PARALLEL, METHODS, TrainingSet
from fr_jax.experiments._models import MODEL_CARDS, random_batch
from fr_jax.partitioning.costs import stage_cost
from fr_jax.training.classification import cross_entropy
from fr_jax.types import Batch, Stage

__all__ = ["Parts", "Problem", "measure_parts", "problem_of", "ring_seconds", "step_seconds"]

CYCLES = 24


class Problem(NamedTuple):
    """The network, a mini-batch of random numbers, and the name of the optimizer."""

    layers: Sequence[Stage]
    batch: Batch
    optimizer: str


class Parts(NamedTuple):
    """What is measured of a method.

    Attributes:
      times: seconds of each stage's functions for one micro-batch, and of its update.
      largest_device: bytes that the device with most of them holds at the peak of a step.
      cuts: of the network.
    """

    times: Times
    largest_device: int
    cuts: tuple[int, ...]


def problem_of(config: Mapping[str, Any], optimizer: str) -> Problem:
    """The network and mini-batch of a run's ``config.json``."""
    model, own = config["model"], {}
    if model in MODEL_CARDS:
        defaults = MODEL_CARDS[model].defaults
        own = {name: default if config.get(name) is None else config[name] for name, default in defaults.items()}
    batch = random_batch(model, config["batch_size"], own.get("context"))
    return Problem(fr.models.MODELS[model](dtype=jnp.dtype(config.get("dtype", "float32")), **own), batch, optimizer)


def measure_parts(problem: Problem, method: str, K: int, M: int, own: Mapping[str, Any], *, rounds: int) -> Parts:
    """Times a method's functions in their places in its step, and follows its memory; ``dp`` is data parallelism.

    The cuts are the best for the method by the time that each layer takes for a micro-batch.
    """
    if method == DATA_PARALLEL:  # each device does what back-propagation does on one, for its part of the mini-batch
        part = jax.tree.map(lambda x: x[: len(x) // K], problem.batch)
        return measure_parts(problem._replace(batch=part), "bp", 1, 1, own, rounds=rounds)
    layers, batch, card = problem.layers, problem.batch, METHODS[method]
    wanted = {"microbatches": M, "pipeline_schedule": "1f1b"}  # of the methods that have them
    own = {name: wanted.get(name, default) for name, default in card.defaults.items()} | dict(own)
    inputs, cuts = batch.inputs, ()
    if K > 1:
        micro = jax.ShapeDtypeStruct((len(inputs) // M, *inputs.shape[1:]), inputs.dtype)
        costs = fr.layer_times(layers, micro)
        cuts = fr.balance_stages(
            lambda k, start, stop: stage_cost(costs, card.work(k, K, own), start, stop), len(layers), K
        )
    optimizer, stages, placement = OPTIMIZERS[problem.optimizer], fr.partition(layers, cuts), fr.placement(K)
    options: dict[str, Any] = {"placement": placement, "microbatches": M, "in_step": True}
    timer = stage_timer([method], stages, cross_entropy, optimizer, batch, **options)
    times = median([timer() for _ in range(rounds)]).times
    common: dict[str, Any] = {"placement": placement, "donate": True}
    algorithm = card.make(own, stages, cross_entropy, optimizer, TrainingSet(None, None), **common)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    return Parts(times, max(device.total for device in step_memory(algorithm, specs).devices), tuple(cuts))


def step_seconds(parts: Parts, method: str, K: int, M: int, crossing: float, all_reduce: float) -> float:
    """Seconds from one step to the next on K devices, in steady state.

    Args:
      parts: what :func:`measure_parts` found.
      method: of the parts.
      K: devices.
      M: micro-batches.
      crossing: seconds in which the features of a mini-batch cross a cut, and their gradients come back.
      all_reduce: seconds in which data-parallel devices add up their gradients.
    """
    schedule = METHODS[method].schedule if method in METHODS else None
    if schedule is None:
        return parts.times.stages[0].last + all_reduce
    links = (crossing / M,) * (K - 1)
    tasks = schedule(parts.times._replace(features=links, gradients=links), CYCLES * K, M)
    return summarise(simulate(tasks), CYCLES * K * 2 // 3).step_seconds


def ring_seconds(problem: Problem, K: int, crossing: float) -> float:
    """Seconds in which K devices add up the gradients of all weights, over links that ``crossing`` is of."""
    features, h, weights = [], jax.ShapeDtypeStruct(problem.batch.inputs.shape, problem.batch.inputs.dtype), 0
    for layer in problem.layers:
        params, state = jax.eval_shape(layer.init, jax.random.key(0), h)
        h, _ = jax.eval_shape(layer.apply, params, state, h)
        weights += _bytes(params)
        features.append(_bytes(h))
    return ring_all_reduce_seconds(weights * crossing, K, bandwidth=statistics.fmean(features[:-1]))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
