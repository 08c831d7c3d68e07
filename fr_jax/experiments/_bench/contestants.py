"""What the speed program times: a plain optax step, and every method of this library, with its cuts and its bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

import fr_jax as fr
from fr_jax.distributed import group
from fr_jax.experiments._bench.turns import Contestant
from fr_jax.experiments._cli.settings import SharedSettings, TrainSettings, own_of_method, own_of_model
from fr_jax.experiments._methods import DATA_PARALLEL, METHODS, REFERENCES, TrainingSet
from fr_jax.experiments._models import CLASSES, example_inputs, random_batch
from fr_jax.experiments._run.cuts import NetworkCosts, choose_cuts, network_costs
from fr_jax.partitioning.costs import LayerCost
from fr_jax.training.classification import cross_entropy
from fr_jax.types import Algorithm, Array, Batch, Stage

__all__ = [
    "BASELINE",
    "Entry",
    "make_batch",
    "make_entry",
    "plain",
    "shared_costs",
    "unsplit",
]

BASELINE = "back-propagation, 1 device"
OPTIMIZER = optax.sgd(0.01, momentum=0.9)
OPTIMIZERS = {
    "sgd": OPTIMIZER,
    "adamw": optax.adamw(1e-3),
    "nadam": fr.staleness.nadam(1e-3, 1)[0],
    "muon": fr.staleness.muon(1e-3, 1, output_layer_by_adam=False)[0],
}
"""What the contestants train with; a step takes the same time at any rate."""


class Entry(NamedTuple):
    """A contestant with what a table says beside it.

    Attributes:
      contestant: what is timed.
      method: ``plain``, ``dp``, or a method's name.
      cuts: of its network.
      bound: how many times as fast as back-propagation on one device it can be; None if no closed form is known.
    """

    contestant: Contestant
    method: str
    cuts: tuple[int, ...]
    bound: float | None


def make_batch(model: str, size: int, sharding: Sharding, context: int | None = None) -> Batch:
    """A :func:`fr_jax.experiments._models.random_batch` on the devices of ``sharding``."""
    inputs, targets, _ = random_batch(model, size, context)
    # jit places an array on a device of another process, where device_put refuses.
    return Batch(*jax.jit(lambda *arrays: arrays, out_shardings=sharding)(inputs, targets))


def shared_costs(settings: TrainSettings, layers: Sequence[Stage], example: jax.ShapeDtypeStruct) -> NetworkCosts:
    """What the first process counts or measures, in every process."""
    jax.devices()  # backends of a group start together: one that waited at the exchange would keep the first waiting
    made = group().from_first(lambda: network_costs(settings, layers, example, settings.balance))
    costs, at_cuts = made
    return NetworkCosts(tuple(LayerCost(*one) for one in costs), tuple(at_cuts))


def shared_settings(settings: Any, **others: Any) -> SharedSettings:
    """What a measuring program's settings and those of a run have in common, and other values."""
    names = {field.name for field in dataclasses.fields(SharedSettings)} - {"steps"}  # of a turn
    common = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name in names
    }
    return SharedSettings(**common | others)


def method_settings(shared: SharedSettings, method: str, K: int, cuts: tuple[int, ...] | None) -> TrainSettings:
    """The settings of a run with the method; those of other methods are dropped, its own filled in."""
    common = {field.name: getattr(shared, field.name) for field in dataclasses.fields(SharedSettings)}
    common |= {"method": method, "K": K, "cuts": cuts if K > 1 else ()}
    return TrainSettings(**common | own_of_method(shared, method))


def unsplit(shared: SharedSettings) -> SharedSettings:
    """The same settings without a number of micro-batches: each method has its own, back-propagation 1."""
    whole: dict[str, Any] = {"microbatches": None}
    return dataclasses.replace(shared, **whole)


def plain(layers: Sequence[Stage], batch: Batch, optimizer: optax.GradientTransformation = OPTIMIZER) -> Entry:
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
        params, model_state = network.init(key, jnp.zeros(batch.inputs.shape, batch.inputs.dtype))
        return params, model_state, optimizer.init(params)

    jitted = jax.jit(step, donate_argnums=0)
    carry = jax.jit(init, out_shardings=batch.inputs.sharding)(jax.random.key(0))
    return Entry(Contestant("plain jitted optax step", lambda carry: jitted(carry, batch), carry), "plain", (), 1.0)


def make_entry(
    shared: SharedSettings,
    layers: Sequence[Stage],
    method: str,
    K: int,
    *,
    cuts: tuple[int, ...] | None = None,
    costs: NetworkCosts | None = None,
    name: str | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Entry:
    """A method of this library on K devices; ``dp`` is back-propagation whose mini-batch is split over them.

    Args:
      shared: model, mini-batch, balance and the methods' own settings.
      layers: the network.
      method: ``dp`` or a name of :data:`fr_jax.experiments._methods.METHODS`.
      K: devices.
      cuts: explicit ones; by default each method's are chosen by what its stages cost.
      costs: of the network with this method, where they are known.
      name: in the table.
      devices: to use, where not all: with fewer than K, stages share them round robin.
    """
    size, context = shared.batch_size or 128, own_of_model(shared).get("context")
    stages_K = 1 if method == DATA_PARALLEL else K
    if method == DATA_PARALLEL:
        settings = method_settings(unsplit(shared), "bp", stages_K, cuts)
    else:
        settings = method_settings(shared, method, stages_K, cuts)
    places = fr.placement(stages_K, devices, K if method == DATA_PARALLEL else 1)
    if stages_K > 1 and cuts is None:
        example = example_inputs(shared.model, size, context)
        if costs is None and settings.balance != "uniform":
            costs = shared_costs(settings, layers, example)
        settings = dataclasses.replace(settings, cuts=choose_cuts(settings, layers, example, costs))
    chosen = tuple(settings.cuts or ())
    own, data = own_of_method(settings, settings.method), TrainingSet(size, CLASSES)
    stages = fr.partition(layers, chosen)
    algorithm: Algorithm = METHODS[settings.method].make(
        own, stages, cross_entropy, OPTIMIZERS[shared.optimizer], data, placement=places, donate=True
    )
    batch = make_batch(shared.model, size, places[0], context)

    def run(state: Any) -> tuple[Any, Array]:
        state, info = algorithm.step(state, batch)
        return state, info.loss

    own_device_each = len(set(places)) == stages_K
    card = REFERENCES[method] if method in REFERENCES else METHODS[method]
    where = f", {K} device{'s' * (K > 1)}" if method in ("bp", DATA_PARALLEL) else f", K = {K}"
    title = name or card.titled(own, where) + ("" if own_device_each else ", devices shared")
    contestant = Contestant(title, run, algorithm.init(jax.random.key(0), batch))
    return Entry(contestant, method, chosen, card.speedup(K, own) if own_device_each or K == 1 else None)
