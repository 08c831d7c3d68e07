"""The cost of each layer of a network: of its forward pass, and with its gradients; counted, or measured."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from fr_jax.stages import check_stages, traced_once
from fr_jax.types import Array, PyTree, Stage

__all__ = ["LayerCost", "StageWork", "layer_costs", "layer_flops", "layer_times", "stage_cost"]


Inputs: TypeAlias = Array | jax.ShapeDtypeStruct


class LayerCost(NamedTuple):
    """What a layer costs for one mini-batch: seconds (:func:`layer_times`), or operations (:func:`layer_flops`).

    Attributes:
      forward: cost of the forward pass, a play.
      weights_gradient: cost of forward pass and gradient for the weights, in one function: the network's first layer.
      both_gradients: cost of forward pass and gradients for weights and input, in one function: a replay.
    """

    forward: float
    weights_gradient: float
    both_gradients: float

    @property
    def input_gradient(self) -> float:
        """Cost of forward pass and gradient for the input only, by the difference of the others."""
        # Times are noisy: the two can be the wrong way round, and a negative cost is no cost.
        return self.forward + max(0.0, self.both_gradients - self.weights_gradient)


class StageWork(NamedTuple):
    """How often a stage does what in one step of a method.

    ``plays`` are forward passes whose activations are not kept; ``passes`` are forward and backward passes, of which
    back-propagation does one; ``input_passes`` have the gradient for the stage's input only (BlockProp's h-steps).
    """

    plays: float = 0.0
    passes: float = 1.0
    input_passes: float = 0.0


def stage_cost(costs: Sequence[LayerCost], work: StageWork, start: int, stop: int) -> float:
    """Cost of one step of a stage that holds ``layers[start:stop]``, in the unit of ``costs`` (one per layer).

    The network's first layer needs no gradient for its input.

    Example:
      >>> stage_cost([LayerCost(1.0, 2.0, 3.0)] * 4, StageWork(plays=1), 0, 2)
      7.0
    """
    total = 0.0
    for i, one in enumerate(costs[start:stop], start):
        total += work.plays * one.forward
        total += work.passes * (one.both_gradients if i > 0 else one.weights_gradient)
        total += work.input_passes * one.input_gradient
    return total


def layer_flops(layers: Sequence[Stage], example_inputs: Inputs) -> list[LayerCost]:
    """The floating-point operations of every layer for a mini-batch, as XLA counts them; nothing runs.

    A loop (``lax.scan``, ``nn.scan``, ``nn.RNN``) counts with all its iterations, a ``lax.while_loop`` with one and a
    warning.

    Args: as for :func:`layer_costs`.

    Raises:
      ValueError: there are no layers, or JAX has no CPU backend (``JAX_PLATFORMS=cuda``), which does the counting.

    Example:
      >>> import jax.numpy as jnp, fr_jax as fr
      >>> first, *_ = layer_flops(fr.models.mlp(depth=2, width=64), jnp.ones((8, 784)))
      >>> 2 * 8 * 784 * 64 <= first.forward < 1.1 * 2 * 8 * 784 * 64
      True
    """
    kinds, of_layer = _different_layers(layers, example_inputs)
    counted = [LayerCost(*(_count_flops(run, *specs) for run, specs in _passes(kind))) for kind in kinds]
    return [counted[i] for i in of_layer]


def layer_times(
    layers: Sequence[Stage], example_inputs: Inputs, *, repeats: int = 5, device: jax.Device | None = None
) -> list[LayerCost]:
    """Seconds of every layer for a mini-batch, measured on a device: the median of some runs.

    Equal layers with equal inputs are measured once. Each function is timed from its call to its result, so the time of
    the call itself is included. Arguments as for :func:`layer_costs`; ``device`` is the default device if None.

    Raises:
      ValueError: there are no layers, or ``repeats`` is less than 1.

    Example:
      >>> import jax.numpy as jnp, fr_jax as fr
      >>> times = layer_times(fr.models.mlp(depth=3, width=64), jnp.ones((8, 784)), repeats=2)
      >>> len(times), times[0].both_gradients > 0
      (3, True)
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats} is too few; every layer is timed at least once. Use 5 or more.")
    kinds, of_layer = _different_layers(layers, example_inputs)
    with jax.default_device(device):
        jobs = [_ready(run, specs, seed) for seed, kind in enumerate(kinds) for run, specs in _passes(kind)]
        # In turns, so that a slow moment of the machine is spread over all layers.
        seconds = [[job() for job in jobs] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    timed = [LayerCost(*medians[i : i + 3]) for i in range(0, len(medians), 3)]
    return [timed[i] for i in of_layer]


def layer_costs(
    layers: Sequence[Stage], example_inputs: Inputs, measure: Literal["flops", "time"] = "flops", *, repeats: int = 5
) -> list[float]:
    """The cost of forward and vector-Jacobian product of every layer, for one mini-batch, as one number each.

    :func:`layer_flops` and :func:`layer_times` have the parts.

    Args:
      layers: the network, one stage per layer.
      example_inputs: ``(B, ...)``, a mini-batch or a ``jax.ShapeDtypeStruct``; only its shape and dtype matter.
      measure: ``"flops"``, counted by XLA without running anything; or ``"time"``, measured on the default device.
      repeats: timed runs of each different layer, after one to warm up.

    Returns:
      One number per layer: floating-point operations, or seconds.

    Raises:
      ValueError: ``measure`` is neither of the two, or there are no layers.

    Example:
      >>> import jax.numpy as jnp, fr_jax as fr
      >>> costs = fr.layer_costs(fr.models.mlp(depth=3, width=64), jnp.ones((8, 784)))
      >>> costs[0] > costs[1]
      True
    """
    if measure not in ("flops", "time"):
        raise ValueError(f"measure = {measure!r} is unknown; it can be 'flops' or 'time'.")
    flops = measure == "flops"
    found = layer_flops(layers, example_inputs) if flops else layer_times(layers, example_inputs, repeats=repeats)
    return [cost.both_gradients for cost in found]


class _Kind(NamedTuple):
    """A layer, and the specs of what it is applied to and returns."""

    layer: Stage
    params: PyTree
    state: PyTree
    h_in: PyTree
    h_out: PyTree


def _different_layers(layers: Sequence[Stage], example_inputs: Inputs) -> tuple[list[_Kind], list[int]]:
    """The layers without repetition, and for each layer which of these it is."""
    if not layers:
        raise ValueError("the cost of no layers was asked for; a network has at least one layer.")
    check_stages(layers, "layer")
    h: Any = jax.ShapeDtypeStruct(example_inputs.shape, jax.dtypes.canonicalize_dtype(example_inputs.dtype))
    known: dict[Any, int] = {}
    kinds, of_layer = [], []
    for layer in layers:
        leaves, treedef = jax.tree.flatten(h)
        same = (layer.apply, treedef, tuple(leaves))
        if same not in known:
            params, state = jax.eval_shape(layer.init, jax.random.key(0), h)
            h_out, _ = jax.eval_shape(_apply(layer), params, state, h)
            known[same] = len(kinds)
            kinds.append(_Kind(layer, params, state, h, h_out))
        of_layer.append(known[same])
        h = kinds[known[same]].h_out
    return kinds, of_layer


def _apply(layer: Stage) -> Callable:
    apply = traced_once(layer.apply)
    return lambda params, state, h: apply(params, state, h, key=jax.random.key(0), train=True)


def _passes(kind: _Kind) -> list[tuple[Callable, tuple]]:
    """The functions of a :class:`LayerCost` and the specs of their arguments."""
    run, specs = _apply(kind.layer), (kind.params, kind.state, kind.h_in)

    def weights_gradient(params: PyTree, state: PyTree, h_in: PyTree, delta: PyTree) -> PyTree:
        h_out, vjp, new_state = jax.vjp(lambda p: run(p, state, h_in), params, has_aux=True)
        return h_out, new_state, vjp(delta)

    def both_gradients(params: PyTree, state: PyTree, h_in: PyTree, delta: PyTree) -> PyTree:
        h_out, vjp, new_state = jax.vjp(lambda p, x: run(p, state, x), params, h_in, has_aux=True)
        return h_out, new_state, vjp(delta)

    # Tokens are integers, which have no gradient: the layer that reads them only has one for its weights.
    differentiable = all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(kind.h_in))
    both = both_gradients if differentiable else weights_gradient
    return [(run, specs), (weights_gradient, (*specs, kind.h_out)), (both, (*specs, kind.h_out))]


def _count_flops(run: Callable, *specs: PyTree) -> float:
    try:
        processor = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            "operations are counted by JAX's CPU backend, which JAX_PLATFORMS hides here. Add it (such as "
            "JAX_PLATFORMS=cuda,cpu), or cut by measured times (balance 'time'), by numbers of layers or by hand."
        ) from error
    with jax.default_device(processor):  # a GPU's backend counts nothing in what is not compiled
        return _flops(run, *specs)


def _flops(run: Callable, *specs: PyTree) -> float:
    """XLA's count, and the iterations of loops that are missing in it: it counts the body of a loop once."""
    traced = jax.jit(run).trace(*specs)
    return _counted_once(traced) + _missing_iterations(traced.jaxpr.jaxpr)


def _counted_once(traced: Any) -> float:
    return float((traced.lower().cost_analysis() or {}).get("flops", 0.0))


def _missing_iterations(jaxpr: Jaxpr) -> float:
    missing = 0.0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, list(_called(eqn))
        if name == "scan":  # nn.RNN and nn.scan too, lax.map, lax.fori_loop of a number of iterations that is known
            bind = functools.partial(eqn.primitive.bind, **eqn.params)
            once = _counted_once(jax.jit(bind).trace(*(_spec(var.aval) for var in eqn.invars)))
            body = _flops(jaxpr_as_fun(eqn.params["jaxpr"]), *map(_spec, eqn.params["jaxpr"].in_avals))
            missing += eqn.params["length"] * body - once
        elif name == "cond":
            missing += max(map(_missing_iterations, inner))
        else:
            if name == "while":
                warnings.warn(
                    "a layer has a loop whose number of iterations is not known before it runs (lax.while_loop, or "
                    "lax.fori_loop with a traced bound); one is counted. Use lax.scan, or measure='time'.",
                    stacklevel=2,
                )
            missing += sum(map(_missing_iterations, inner))
    return missing


def _called(eqn: Any) -> Iterator[Jaxpr]:
    """The functions in an equation's parameters."""
    for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
        if isinstance(leaf, Jaxpr | ClosedJaxpr):
            yield leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _ready(run: Callable, specs: tuple, seed: int) -> Callable[[], float]:
    """``run``, compiled and warm, with random arguments: a call does it once and returns the seconds."""
    rng = np.random.default_rng(seed)

    def fill(spec: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(spec.dtype, jnp.inexact):
            return jnp.asarray(rng.standard_normal(spec.shape, np.float32) * 0.1, spec.dtype)
        return jnp.zeros(spec.shape, spec.dtype)

    jitted, arguments = jax.jit(run), jax.tree.map(fill, specs)
    jax.block_until_ready(jitted(*arguments))

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(jitted(*arguments))
        return time.perf_counter() - start

    return once
