"""From settings to something that can train: data, network, cuts, devices, method."""

from __future__ import annotations

import contextlib
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
from fr_jax.experiments._cli.checks import default_batch_size, resolve
from fr_jax.experiments._cli.settings import SettingsError, TrainSettings
from fr_jax.experiments._cli.xla_flags import set_xla_flags
from fr_jax.experiments._methods import METHODS, MODEL_SETTINGS, own_settings
from fr_jax.experiments._run.cuts import NetworkCosts, choose_cuts, network_costs, stage_costs
from fr_jax.experiments._run.processes import choose_devices
from fr_jax.training.classification import cross_entropy, training_metrics
from fr_jax.types import Algorithm, Batch, Stage

__all__ = ["Session", "build", "request_devices"]


class Session(NamedTuple):
    """A training run before its first step.

    Attributes:
      settings: with every default filled in.
      dataset: the images.
      pipeline: makes mini-batches on the first stage's device.
      layers: the network.
      costs: of the layers, in FLOPs of a mini-batch.
      cuts: where the layers are cut.
      placement: one sharding a stage.
      algorithm: the method.
    """

    settings: TrainSettings
    dataset: Dataset
    pipeline: InputPipeline
    layers: list[Stage]
    costs: NetworkCosts
    cuts: tuple[int, ...]
    placement: tuple[Sharding, ...]
    algorithm: Algorithm


def request_devices(wanted: int) -> None:
    """Asks JAX for that many CPU devices, where nothing has been asked of JAX yet; harmless where there are GPUs."""
    set_xla_flags()
    config: Any = jax.config
    with contextlib.suppress(RuntimeError, ValueError):  # the backend is up already: use what there is
        if config.jax_num_cpu_devices < wanted:
            config.update("jax_num_cpu_devices", wanted)


def build(settings: TrainSettings, dataset: Dataset, saved_cuts: Sequence[int] | None = None) -> Session:
    """Cuts the network, places it, and makes the method and the input pipeline.

    Args:
      settings: checked settings.
      dataset: the data.
      saved_cuts: of a run that is being resumed; they are kept, because measured times differ from day to day.

    Raises:
      ValueError: a setting does not fit the network, the devices or the data (``SettingsError`` among them).
    """
    layers = make_layers(settings, dataset.num_classes)
    devices = choose_devices(settings)
    placement = fr.placement(settings.K, devices, settings.data_parallel)
    batch_size = default_batch_size(settings, dataset.name)
    pipeline = input_pipeline(dataset, batch_size, seed=settings.seed, sharding=placement[0])
    settings = resolve(settings, dataset.name, batch_size, pipeline.steps_per_epoch)
    example = jax.ShapeDtypeStruct((batch_size, *dataset.train_images.shape[1:]), jnp.float32)
    costs = network_costs(settings, layers, example)
    if saved_cuts is None:  # where times are measured, all processes must use the same
        saved_cuts = distributed.group().from_first(lambda: _cuts(settings, layers, costs, example))
    cuts = tuple(saved_cuts)
    algorithm = make_algorithm(settings, fr.partition(layers, cuts), placement, pipeline.steps_per_epoch, dataset)
    return Session(settings, dataset, pipeline, layers, costs, cuts, placement, algorithm)


def _cuts(
    settings: TrainSettings, layers: list[Stage], costs: NetworkCosts, example: jax.ShapeDtypeStruct
) -> tuple[int, ...]:
    """By the counted costs, or by times measured now on one device's share of a mini-batch."""
    rows = max(1, example.shape[0] // settings.data_parallel)
    share = jax.ShapeDtypeStruct((rows, *example.shape[1:]), example.dtype)
    return choose_cuts(settings, layers, share, costs if settings.balance == "flops" else None)


def make_layers(settings: TrainSettings, num_classes: int) -> list[Stage]:
    """The layers of the network.

    Raises:
      SettingsError: it has fewer than K.
    """
    own = {name: own_settings(settings, settings.method)[name] for name in MODEL_SETTINGS.get(settings.model, ())}
    layers = fr.models.MODELS[settings.model](num_classes=num_classes, dtype=jnp.dtype(settings.dtype), **own)
    if len(layers) < settings.K:
        raise SettingsError(
            f"--K {settings.K} stages were asked of {settings.model}, which has {len(layers)} layers; K can be 1 to "
            f"{len(layers)}. Use a smaller K or a deeper model."
        )
    return layers


def stage_work(session: Session) -> list[float]:
    """FLOPs that each stage does for one step of the method."""
    return stage_costs(session.settings, session.costs, session.cuts)


def learning_rate_schedule(settings: TrainSettings, steps_per_epoch: int) -> optax.Schedule:
    """The initial rate, divided by 10 after each milestone (epochs); it counts updates."""
    assert settings.learning_rate is not None and settings.milestones is not None
    updates_per_epoch = steps_per_epoch / (settings.accumulate or 1)
    # The hundredth of a step keeps 0.7 x 10 = 7.000000000000001 from becoming 8.
    boundaries = [math.ceil(epoch * updates_per_epoch - 0.01) for epoch in settings.milestones]
    scales = {boundary: 0.1 ** boundaries.count(boundary) for boundary in boundaries}
    return optax.piecewise_constant_schedule(settings.learning_rate, scales)


def make_optimizer(settings: TrainSettings, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient, as in the papers' PyTorch code."""
    schedule = learning_rate_schedule(settings, steps_per_epoch)
    sgd = optax.sgd(schedule, momentum=settings.momentum or None, nesterov=settings.nesterov)
    if not settings.weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), sgd)


def make_algorithm(
    settings: TrainSettings,
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
        settings,
        stages,
        cross_entropy,
        make_optimizer(settings, steps_per_epoch),
        len(dataset.train_labels),
        dataset.num_classes,
        placement=placement,
        return_grads=return_grads,
        donate=not return_grads,
        metrics_fn=training_metrics,
    )


def initial_state(session: Session) -> Any:
    """The state before the first step."""
    batch: Batch = session.pipeline.train_batch(0)
    return session.algorithm.init(jax.random.key(session.settings.seed), batch)
