"""From settings to something that can train: data, network, cuts, devices, method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding

import fr_jax as fr
from fr_jax import distributed
from fr_jax.experiments._cli.settings import Resolved, own_of_method
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS, TrainingSet
from fr_jax.experiments._run.cuts import NetworkCosts, choose_cuts, network_costs, stage_costs
from fr_jax.experiments._run.optimizers import make_optimizers
from fr_jax.experiments._run.processes import choose_devices
from fr_jax.experiments._run.tasks import Data, kind_of
from fr_jax.training.task import Task
from fr_jax.types import Algorithm, Batch, PyTree, Stage

__all__ = ["Session", "build"]


class Session(NamedTuple):
    """A training run before its first step. ``costs`` are in FLOPs of a mini-batch; ``placement`` has one per stage."""

    settings: Resolved
    task: Task
    layers: list[Stage]
    costs: NetworkCosts
    cuts: tuple[int, ...]
    placement: tuple[Sharding, ...]
    algorithm: Algorithm


def build(settings: Resolved, data: Data, saved_cuts: Sequence[int] | None = None) -> Session:
    """Cuts the network, places it, and makes the method and the task; a ValueError says what does not fit.

    ``saved_cuts`` of a run that is being resumed are kept, because measured times differ from day to day.
    """
    layers = make_layers(settings, data)
    devices, shard = choose_devices(settings), settings.shard_params
    placement = fr.placement(settings.K, devices, settings.data_parallel, shard_params=shard)
    task = kind_of(settings.model).task(settings, data, placement[0])  # only the first stage sees inputs
    example = _shapes(task.pipeline.train_batch(0).inputs)
    costs = network_costs(settings, layers, example)
    if saved_cuts is None:  # where times are measured, all processes must use the same
        saved_cuts = distributed.group().from_first(lambda: _cuts(settings, layers, costs, example))
    cuts = tuple(saved_cuts)
    algorithm = make_algorithm(settings, fr.partition(layers, cuts), placement, task)
    return Session(settings, task, layers, costs, cuts, placement, algorithm)


def _shapes(inputs: PyTree, shares: int = 1) -> PyTree:
    """The shapes and dtypes of a mini-batch, or of a device's share of it."""
    share = lambda x: jax.ShapeDtypeStruct((max(1, x.shape[0] // shares), *x.shape[1:]), x.dtype)
    return jax.tree.map(share, inputs)


def _cuts(settings: Resolved, layers: list[Stage], costs: NetworkCosts, example: PyTree) -> tuple[int, ...]:
    """By the counted costs, or by times measured now on one device's share of a mini-batch."""
    share = _shapes(example, settings.data_parallel)
    return choose_cuts(settings, layers, share, costs if settings.balance == "flops" else None)


def make_layers(settings: Resolved, data: Data) -> list[Stage]:
    """The layers of the network; a SettingsError if there are fewer than K."""
    layers = kind_of(settings.model).layers(settings, data)
    if len(layers) < settings.K:
        raise SettingsError(
            f"--K {settings.K} stages were asked of {settings.model}, which has {len(layers)} layers; K can be 1 to "
            f"{len(layers)}. Use a smaller K or a deeper model."
        )
    return layers


def stage_work(session: Session) -> list[float]:
    """FLOPs that each stage does for one step of the method."""
    return stage_costs(session.settings, session.costs, session.cuts)


def make_algorithm(
    settings: Resolved,
    stages: Sequence[Stage],
    placement: Sequence[Sharding],
    task: Task,
    *,
    return_grads: bool = False,
) -> Algorithm:
    """The method, set up to train: buffers are reused, the task's metrics are reported.

    With ``return_grads`` it is set up for inspection instead: it returns gradients, and a state outlives its step.
    """
    card = METHODS[settings.method]
    inputs = jax.tree.leaves(task.pipeline.train_batch(0).inputs) if card.whole else []
    return card.make(
        own_of_method(settings, settings.method),
        stages,
        task.loss,
        make_optimizers(settings, task.pipeline.steps_per_epoch),
        TrainingSet(task.examples, task.num_classes, sum(math.prod(leaf.shape[1:]) for leaf in inputs) or None),
        placement=placement,
        return_grads=return_grads,
        donate=not return_grads,
        metrics_fn=task.metrics,
        skip_nonfinite=settings.skip_nonfinite,
    )


def initial_state(session: Session) -> Any:
    """The state before the first step."""
    batch: Batch = session.task.pipeline.train_batch(0)
    return session.algorithm.init(jax.random.key(session.settings.seed), batch)
