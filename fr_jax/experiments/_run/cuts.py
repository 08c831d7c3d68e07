"""Where the programs cut a network: by what each stage of the chosen method costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

import fr_jax as fr
from fr_jax.experiments._cli.settings import TrainSettings, own_of_method
from fr_jax.experiments._methods import METHODS
from fr_jax.partitioning.costs import LayerCost, stage_cost
from fr_jax.types import Stage

__all__ = ["NetworkCosts", "choose_cuts", "cost_of_stage", "network_costs", "stage_costs"]

REPEATS = 9


class NetworkCosts(NamedTuple):
    """What a network costs with a method, in FLOPs or seconds per mini-batch.

    ``at_cuts``: for each layer, what a stage that ends with it does in addition (a synthesizer, DNI); else zero.
    """

    layers: tuple[LayerCost, ...]
    at_cuts: tuple[float, ...]


def network_costs(
    settings: TrainSettings, layers: Sequence[Stage], example: jax.ShapeDtypeStruct, measure: str = "flops"
) -> NetworkCosts:
    """Counts (``"flops"``), or measures on this process's first device (``"time"``)."""

    def costs_of(stages: Sequence[Stage], inputs: jax.ShapeDtypeStruct) -> list[LayerCost]:
        if measure == "time":
            return fr.layer_times(stages, inputs, repeats=REPEATS)
        return fr.layer_flops(stages, inputs)

    at_cuts = [0.0] * len(layers)
    if (at_cut := METHODS[settings.method].at_cut) is not None:
        network = at_cut(own_of_method(settings, settings.method))
        known: dict[tuple[int, ...], float] = {}
        for i, h in enumerate(_outputs(layers, example)[:-1]):
            if h.shape not in known:  # counted or measured once per shape
                known[h.shape] = costs_of([network], h)[0].weights_gradient
            at_cuts[i] = known[h.shape]
    return NetworkCosts(tuple(costs_of(layers, example)), tuple(at_cuts))


def _outputs(layers: Sequence[Stage], example: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    outputs, h = [], example
    for layer in layers:
        params, state = jax.eval_shape(layer.init, jax.random.key(0), h)
        h, _ = jax.eval_shape(lambda p, s, x, layer=layer: layer.apply(p, s, x, train=False), params, state, h)
        outputs.append(h)
    return outputs


def cost_of_stage(settings: TrainSettings, costs: NetworkCosts, k: int, start: int, stop: int) -> float:
    """What stage k = 0..K-1 costs in one step of the method if it holds ``layers[start:stop]``."""
    besides = costs.at_cuts[stop - 1] if k < settings.K - 1 else 0.0
    work = METHODS[settings.method].work(k, settings.K, own_of_method(settings, settings.method))
    return stage_cost(costs.layers, work, start, stop) + besides


def stage_costs(settings: TrainSettings, costs: NetworkCosts, cuts: Sequence[int]) -> list[float]:
    """What each of the K stages costs in one step of the method."""
    bounds = (0, *cuts, len(costs.layers))
    return [cost_of_stage(settings, costs, k, bounds[k], bounds[k + 1]) for k in range(settings.K)]


def choose_cuts(
    settings: TrainSettings,
    layers: Sequence[Stage],
    example: jax.ShapeDtypeStruct,
    costs: NetworkCosts | None = None,
) -> tuple[int, ...]:
    """The K-1 cuts: explicit, equal numbers of layers, or those that minimise the slowest stage.

    ``example`` has the shape of a stage's mini-batch on one device; ``costs`` are given if they are known already.
    Measured times differ from process to process: choose in one, and tell the others.
    """
    if settings.cuts is not None:
        return tuple(settings.cuts)
    if settings.balance == "uniform":
        return tuple(round(len(layers) * k / settings.K) for k in range(1, settings.K))
    known = network_costs(settings, layers, example, settings.balance) if costs is None else costs
    return fr.balance_stages(
        lambda k, start, stop: cost_of_stage(settings, known, k, start, stop), len(layers), settings.K
    )
