"""From settings to something that can train: data, network, cuts, devices, method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

import fr_jax as fr
from fr_jax import distributed
from fr_jax.data.image_sets import Dataset
from fr_jax.data.pipelines import InputPipeline, input_pipeline
from fr_jax.experiments._cli.settings import Resolved, own_of_method, own_of_model
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS, TrainingSet
from fr_jax.experiments._run.cuts import NetworkCosts, choose_cuts, network_costs, stage_costs
from fr_jax.experiments._run.processes import choose_devices
from fr_jax.training.classification import cross_entropy, training_metrics
from fr_jax.types import Algorithm, Batch, Stage

__all__ = ["Session", "build"]


class Session(NamedTuple):
    """A training run before its first step.

    Attributes:
      settings: of the run.
      dataset: the images.
      pipeline: makes mini-batches on the first stage's device.
      layers: the network.
      costs: of the layers, in FLOPs of a mini-batch.
      cuts: where the layers are cut.
      placement: one sharding a stage.
      algorithm: the method.
    """

    settings: Resolved
    dataset: Dataset
    pipeline: InputPipeline
    layers: list[Stage]
    costs: NetworkCosts
    cuts: tuple[int, ...]
    placement: tuple[Sharding, ...]
    algorithm: Algorithm


def build(settings: Resolved, dataset: Dataset, saved_cuts: Sequence[int] | None = None) -> Session:
    """Cuts the network, places it, and makes the method and the input pipeline.

    Args:
      settings: of the run, made for this data set.
      dataset: the data.
      saved_cuts: of a run that is being resumed; they are kept, because measured times differ from day to day.

    Raises:
      ValueError: a setting does not fit the network, the devices or the data (``SettingsError`` among them).
    """
    layers = make_layers(settings, dataset.num_classes)
    devices = choose_devices(settings)
    placement = fr.placement(settings.K, devices, settings.data_parallel)
    pipeline = input_pipeline(dataset, settings.batch_size, seed=settings.seed, sharding=placement[0])
    example = jax.ShapeDtypeStruct((settings.batch_size, *dataset.train_images.shape[1:]), jnp.float32)
    costs = network_costs(settings, layers, example)
    if saved_cuts is None:  # where times are measured, all processes must use the same
        saved_cuts = distributed.group().from_first(lambda: _cuts(settings, layers, costs, example))
    cuts = tuple(saved_cuts)
    algorithm = make_algorithm(settings, fr.partition(layers, cuts), placement, pipeline.steps_per_epoch, dataset)
    return Session(settings, dataset, pipeline, layers, costs, cuts, placement, algorithm)


def _cuts(
    settings: Resolved, layers: list[Stage], costs: NetworkCosts, example: jax.ShapeDtypeStruct
) -> tuple[int, ...]:
    """By the counted costs, or by times measured now on one device's share of a mini-batch."""
    rows = max(1, example.shape[0] // settings.data_parallel)
    share = jax.ShapeDtypeStruct((rows, *example.shape[1:]), example.dtype)
    return choose_cuts(settings, layers, share, costs if settings.balance == "flops" else None)


def make_layers(settings: Resolved, num_classes: int) -> list[Stage]:
    """The layers of the network.

    Raises:
      SettingsError: it has fewer than K.
    """
    own, dtype = own_of_model(settings), jnp.dtype(settings.dtype)
    layers = fr.models.MODELS[settings.model](num_classes=num_classes, dtype=dtype, **own)
    if len(layers) < settings.K:
        raise SettingsError(
            f"--K {settings.K} stages were asked of {settings.model}, which has {len(layers)} layers; K can be 1 to "
            f"{len(layers)}. Use a smaller K or a deeper model."
        )
    return layers


def stage_work(session: Session) -> list[float]:
    """FLOPs that each stage does for one step of the method."""
    return stage_costs(session.settings, session.costs, session.cuts)


def learning_rate_schedule(settings: Resolved, steps_per_epoch: int) -> optax.Schedule:
    """The initial rate, divided by 10 after each milestone (epochs); it counts updates."""
    updates_per_epoch = steps_per_epoch / own_of_method(settings, settings.method).get("accumulate", 1)
    # The hundredth of a step keeps 0.7 x 10 = 7.000000000000001 from becoming 8.
    boundaries = [math.ceil(epoch * updates_per_epoch - 0.01) for epoch in settings.milestones]
    scales = {boundary: 0.1 ** boundaries.count(boundary) for boundary in boundaries}
    return optax.piecewise_constant_schedule(settings.learning_rate, scales)


def make_optimizer(settings: Resolved, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, as in the papers' PyTorch code."""
    schedule = learning_rate_schedule(settings, steps_per_epoch)
    sgd = optax.sgd(schedule, momentum=settings.momentum or None, nesterov=settings.nesterov)
    if not settings.weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), sgd)


def make_algorithm(
    settings: Resolved,
    stages: Sequence[Stage],
    placement: Sequence[Sharding],
    steps_per_epoch: int,
    dataset: Dataset,
    *,
    return_grads: bool = False,
) -> Algorithm:
    """The method, set up to train: buffers are reused, accuracy is reported.

    With ``return_grads`` it is set up to be looked at instead: it returns gradients, and a state outlives its step.
    """
    return METHODS[settings.method].make(
        own_of_method(settings, settings.method),
        stages,
        cross_entropy,
        make_optimizer(settings, steps_per_epoch),
        TrainingSet(len(dataset.train_labels), dataset.num_classes),
        placement=placement,
        return_grads=return_grads,
        donate=not return_grads,
        metrics_fn=training_metrics,
    )


def initial_state(session: Session) -> Any:
    """The state before the first step."""
    batch: Batch = session.pipeline.train_batch(0)
    return session.algorithm.init(jax.random.key(session.settings.seed), batch)
