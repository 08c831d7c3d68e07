"""The networks and methods that ``fr_jax.experiments.scaling`` simulates.

The unit of time is the forward pass of the whole network; a backward pass takes 2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

import fr_jax as fr
from fr_jax.diagnostics.simulation.schedules import data_parallel
from fr_jax.diagnostics.simulation.timeline import Task, simulate, summarise
from fr_jax.diagnostics.simulation.times import balanced_shares, ring_all_reduce_seconds, times_of_costs
from fr_jax.experiments._methods import COMPARED as SIMULATED
from fr_jax.experiments._methods import METHODS
from fr_jax.types import Stage

__all__ = ["COMPARED", "STEP", "Network", "described", "ideal", "own_of", "schedule", "speedups"]

COMPARED = {name: card for name, card in SIMULATED.items() if name != "2bw"}
"""What is simulated: everything but 2BW, which takes DDG's time and needs at least K micro-batches."""

STEP = 3.0
"""A step of back-propagation on one device: forward 1, backward 2."""


def own_of(name: str, microbatches: int) -> dict[str, Any]:
    """The own settings of one of :data:`COMPARED`, with this many micro-batches if it needs some."""
    own = METHODS[name].defaults if name in METHODS else {}
    return own | ({"microbatches": microbatches} if own.get("microbatches", 1) > 1 else {})


class Stages(NamedTuple):
    """A network cut into K: costs of the stages, and of what is at the K-1 cuts.

    Attributes:
      costs: forward and backward pass of each stage.
      sizes: of the features at each cut, over the mean of all places to cut.
      synthesizers: forward and backward pass of a DNI synthesizer at each cut.
    """

    costs: tuple[float, ...]
    sizes: tuple[float, ...]
    synthesizers: tuple[float, ...]


class Network(NamedTuple):
    """A list of layers and their costs, which add up to :data:`STEP`; without layers: one that can be cut anywhere.

    Attributes:
      costs: forward and backward pass of each layer.
      sizes: of the features after each layer but the last, over their mean.
      synthesizers: forward and backward pass of a DNI synthesizer at each of these places.
      weights: bytes of all weights over the mean bytes of the features at a cut.
      mean_feature_bytes: these.
    """

    costs: tuple[float, ...]
    sizes: tuple[float, ...]
    synthesizers: tuple[float, ...]
    weights: float
    mean_feature_bytes: float

    def fits(self, K: int) -> bool:
        """Whether it can be cut into K stages."""
        return not self.costs or len(self.costs) >= K

    def cuts(self, K: int, last_stage_weight: float) -> list[int] | None:
        """Where it is cut, or None where it cannot be."""
        if not self.costs or not self.fits(K):
            return None
        return list(fr.balance(self.costs, K, last_stage_weight=last_stage_weight))

    def cut(self, K: int, last_stage_weight: float) -> Stages:
        """The stages."""
        cuts = self.cuts(K, last_stage_weight)
        if cuts is None:
            shares = balanced_shares(K, last_stage_weight=last_stage_weight)
            return Stages(tuple(STEP * share for share in shares), (1.0,) * (K - 1), (0.0,) * (K - 1))
        bounds = (0, *cuts, len(self.costs))
        costs = tuple(math.fsum(self.costs[i:j]) for i, j in zip(bounds, bounds[1:], strict=False))
        return Stages(costs, tuple(self.sizes[i - 1] for i in cuts), tuple(self.synthesizers[i - 1] for i in cuts))


def ideal(weights: float) -> Network:
    """A network that can be cut anywhere, with equal features everywhere and synthesizers that cost nothing.

    Args:
      weights: bytes of all weights over those of a feature.
    """
    return Network((), (), (), weights, math.nan)


def described(layers: Sequence[Stage], inputs: jax.ShapeDtypeStruct, measure: Literal["flops", "time"]) -> Network:
    """A network with the costs of its layers.

    Args:
      layers: the network.
      inputs: the spec of a mini-batch.
      measure: of :func:`fr_jax.layer_costs`; by it a synthesizer is weighed as well.
    """
    costs = fr.layer_costs(layers, inputs, measure)
    unit = STEP / math.fsum(costs)
    features, weights, h = [], 0, inputs
    for layer in layers:
        params, state = jax.eval_shape(layer.init, jax.random.key(0), h)
        weights += _bytes(params)
        h, _ = jax.eval_shape(_train(layer), params, state, h)
        features.append(h)
    # The last layer's output crosses no cut.
    features.pop()
    mean = statistics.fmean(map(_bytes, features)) if features else math.nan
    # By shape: a residual network has many features and few shapes, and each synthesizer is compiled.
    of_shape: dict[Any, float] = {}
    for h in features:
        if (h.shape, h.dtype) not in of_shape:
            of_shape[h.shape, h.dtype] = fr.layer_costs([fr.models.synthesizer()], h, measure)[0] * unit
    return Network(
        tuple(cost * unit for cost in costs),
        tuple(_bytes(h) / mean for h in features),
        tuple(of_shape[h.shape, h.dtype] for h in features),
        weights / mean,
        mean,
    )


def _train(layer: Stage) -> Callable:
    return lambda params, state, h: layer.apply(params, state, h, key=jax.random.key(0), train=True)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def schedule(name: str, network: Network, K: int, ratio: float, M: int, steps: int) -> tuple[Task, ...]:
    """What a method issues.

    Args:
      name: a key of :data:`COMPARED`.
      network: what it trains.
      K: devices.
      ratio: seconds in which mean features cross a cut, over those of a step of back-propagation on one device.
      M: micro-batches of the methods that need some.
      steps: how many.
    """
    mean_transfer, card, own = ratio * STEP, COMPARED[name], own_of(name, M)
    if card.schedule is None:
        # The size is given in the seconds in which it crosses a link, so the bandwidth is 1.
        all_reduce = ring_all_reduce_seconds(network.weights * mean_transfer, K, bandwidth=1.0)
        return data_parallel(STEP / K, K, steps, all_reduce)
    parts = own.get("microbatches", 1)
    stages = network.cut(K, card.last_stage_weight(K, own))
    # The times of one micro-batch, which has 1/M of the work and of the bytes.
    times = times_of_costs(
        [cost / parts for cost in stages.costs],
        [size * mean_transfer / parts for size in stages.sizes],
        synthesizers=stages.synthesizers,
    )
    return card.schedule(times, steps, parts)


def speedups(network: Network, K: int, ratio: float, M: int) -> dict[str, float] | None:
    """Every method's speedup over back-propagation on one device, in steady state; None where K is too large."""
    if not network.fits(K):
        return None
    found = {}
    for name, card in COMPARED.items():
        # With transfers a decoupled method repeats itself every K steps, or every few times K: a part of such a cycle
        # is not its mean. Before that, DDG runs ahead for some 150 steps of what a network with uneven cuts keeps up.
        cycles = max(6, 12 * (32 // K))
        steps, skip = (cycles * K, cycles * 2 // 3 * K) if card.decoupled else (4, 2)
        tasks = schedule(name, network, K, ratio, M, steps)
        found[name] = STEP / summarise(simulate(tasks), skip).step_seconds
    return found
