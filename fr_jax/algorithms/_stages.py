"""What every method does before its first step: check its arguments, and set K modules up on their devices."""

from __future__ import annotations

import contextlib
import functools
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax._arrays import place
from fr_jax._placement import check_placement, data_parallel_size, replicated
from fr_jax.stages import Chain, check_stages, traced_once
from fr_jax.types import Array, Batch, BatchSpec, PyTree, Stage

Optimizers: TypeAlias = optax.GradientTransformation | Sequence[optax.GradientTransformation]


class KeyStream(NamedTuple):
    """A module's source of dropout keys: mini-batch s draws from ``fold_in(key, s)``, in play and in replay.

    Attributes:
      key: the module's own key.
      count: int32 scalar on the module's device, the number of mini-batches played. It stands beside
        ``State.step`` so that a step transfers nothing from the host.
    """

    key: Array
    count: Array


class Setup(NamedTuple):
    """The checked arguments of a method."""

    stages: tuple[Stage, ...]
    optimizers: tuple[optax.GradientTransformation, ...]
    shardings: tuple[Sharding | None, ...]


class Modules(NamedTuple):
    """K freshly initialised modules, each on its device; ``features[k]`` describes module k's input.

    ``key`` is for what a method has besides.
    """

    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    features: tuple[PyTree, ...]
    key: Array
    batch_spec: BatchSpec


def check_count(name: str, value: Any, least: int = 1, why: str = "") -> int:
    """A whole number from ``least`` on; raises ValueError, with ``why`` at the end of the message."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r} was given; it must be a whole number, at least {least}.{why}")
    return int(value)


def check_setup(stages: Sequence[Stage], optimizer: Optimizers, placement: Sequence[Sharding] | None) -> Setup:
    """Checks what every method is given, and brings it to one entry a stage.

    Raises:
      ValueError: no stages, something that is not a Stage, or a number of optimizers or shardings other than K.
    """
    if isinstance(stages, Stage):
        stages = (stages,)
    stages = tuple(stages)
    if not stages:
        raise ValueError("0 stages were given; a network has at least one. Make them with fr_jax.partition or chain.")
    check_stages(stages, "stage")
    K = len(stages)
    if isinstance(optimizer, optax.GradientTransformation) or not isinstance(optimizer, Sequence):
        optimizers = (optimizer,) * K
    else:
        optimizers = tuple(optimizer)
    for one in optimizers:
        if not isinstance(one, optax.GradientTransformation):
            raise ValueError(
                f"optimizer {one!r} is not an optax transformation. Pass one, such as optax.sgd(0.1), for all stages, "
                f"or a sequence of {K}."
            )
    if len(optimizers) != K:
        raise ValueError(
            f"{len(optimizers)} optimizers were given for K = {K} stages. Pass one optax transformation for all of "
            f"them, or a sequence of {K}."
        )
    return Setup(stages, optimizers, check_placement(placement, K))


def init_modules(setup: Setup, key: Array, batch: Batch) -> Modules:
    """Initialises every module on its device, from the shapes of ``batch`` alone.

    Layer i of the network, counted over all modules, draws its weights from ``fold_in(weights_key, i)``: the
    same key gives the same weights for every choice of cuts, so that methods and K start from the same point.

    Raises:
      ValueError: the key is none, the batch is none or has no examples or not as many targets as inputs, it cannot be
        split over the devices of a stage, or a stage sends something on that has no gradient.
    """
    if not isinstance(key, jax.Array):
        raise ValueError(f"init() was given key = {key!r}; it must be a JAX random key, such as jax.random.key(0).")
    check_example(batch)
    check_divisible(batch, setup.shardings)
    weights_key, dropout_key, own_key = jax.random.split(key, 3)
    h = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), batch.inputs)
    params, model_state, opt_state, streams, features = [], [], [], [], []
    first = 0
    for k, (stage, optimizer, sharding) in enumerate(zip(*setup, strict=True)):
        here = replicated(sharding)
        features.append(h)
        layers = stage.layers if isinstance(stage, Chain) else (stage,)
        layer_keys = [jax.random.fold_in(weights_key, i) for i in range(first, first + len(layers))]
        stream = KeyStream(jax.random.fold_in(dropout_key, k), jnp.zeros((), jnp.int32))
        layer_keys, stream = place((layer_keys, stream), here)
        weights, states = [], []
        for i, (layer, layer_key) in enumerate(zip(layers, layer_keys, strict=True), start=first):
            with _said_where(k, i, h):
                layer_params, layer_state = init_stage(layer, layer_key, h, here)
                h, _ = jax.eval_shape(traced_once(layer.apply), layer_params, layer_state, h, key=dropout_key)
            weights.append(layer_params)
            states.append(layer_state)
        first += len(layers)
        params.append(tuple(weights) if isinstance(stage, Chain) else weights[0])
        model_state.append(tuple(states) if isinstance(stage, Chain) else states[0])
        opt_state.append(jax.jit(optimizer.init, out_shardings=here)(params[k]))
        streams.append(stream)
        if k < len(setup.stages) - 1:
            _check_feature(h, k + 1)
    spec = BatchSpec.of(batch)
    return Modules(tuple(params), tuple(model_state), tuple(opt_state), tuple(streams), tuple(features), own_key, spec)


@contextlib.contextmanager
def _said_where(k: int, i: int, h: PyTree) -> Iterator[None]:
    """Adds to an exception in which layer it was raised, and for what input."""
    try:
        yield
    except Exception as error:
        given = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", h)
        error.add_note(f"This is layer {i} (from 0) of the network, in stage {k + 1}; its input is {given}.")
        raise


def check_example(batch: Batch, called: str = "init()") -> None:
    """Raises ValueError where ``batch`` is no mini-batch of arrays; ``called`` is what was given it."""
    _check_kind(batch, called)
    inputs, targets = batch.inputs.shape, batch.targets.shape
    if not inputs or not inputs[0] or inputs[:1] != targets[:1]:
        raise ValueError(
            f"{called} was given inputs of shape {inputs} and targets of shape {targets}; both must have the same "
            "number of examples, at least one, along the first axis."
        )


def _check_kind(batch: Batch, called: str) -> None:
    if not isinstance(batch, Batch) or any(not hasattr(x, "shape") or not hasattr(x, "dtype") for x in batch[:2]):
        kinds = (
            f" of {type(batch.inputs).__name__} and {type(batch.targets).__name__}" if isinstance(batch, Batch) else ""
        )
        raise ValueError(
            f"{called} was given a {type(batch).__name__}{kinds} as batch; it must be fr_jax.Batch(inputs, targets), "
            "each one array with the examples along the first axis."
        )


def init_stage(layer: Stage, key: Array, h: PyTree, sharding: Sharding | None) -> tuple[PyTree, PyTree]:
    """Weights and state of a layer for an input like ``h`` (a spec), on its devices."""
    leaves, treedef = jax.tree.flatten(h)
    return _jitted_init(layer.init, treedef, tuple(leaves), sharding)(key)


@functools.lru_cache(maxsize=1024)
def _jitted_init(init: Callable, treedef: Any, leaves: tuple, sharding: Sharding | None) -> Callable:
    """One compilation for all equal layers of a device."""
    return jax.jit(lambda key: init(key, _zeros(treedef.unflatten(leaves))), out_shardings=sharding)


def _zeros(spec: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)


def zeros(spec: PyTree, sharding: Sharding | None) -> PyTree:
    """Zeros of the given shapes and dtypes, on a stage's devices."""
    leaves, treedef = jax.tree.flatten(spec)
    return _jitted_zeros(treedef, tuple(leaves), sharding)()


@functools.lru_cache(maxsize=1024)
def _jitted_zeros(treedef: Any, leaves: tuple, sharding: Sharding | None) -> Callable:
    """One compilation for all entries of a history."""
    return jax.jit(lambda: _zeros(treedef.unflatten(leaves)), out_shardings=sharding)


def _check_feature(h: PyTree, k: int) -> None:
    for leaf in jax.tree.leaves(h):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"stage {k} sends {leaf.dtype} of shape {leaf.shape} to stage {k + 1}; what crosses a cut must be "
                "floating point, because a gradient is sent back for it. Move the cut."
            )


def check_divisible(batch: Batch, shardings: Sequence[Sharding | None]) -> None:
    """Raises ValueError where the batch cannot be split over a stage's devices."""
    for sharding in shardings:
        D = data_parallel_size(sharding)
        if batch.inputs.shape[0] % D:
            raise ValueError(
                f"a batch of {batch.inputs.shape[0]} examples cannot be split over data_parallel = {D} devices; "
                f"the batch size must be a multiple of {D}."
            )


def check_batch(spec: BatchSpec, batch: Batch) -> None:
    """Raises ValueError where a batch is not like the one that the state was made for."""
    _check_kind(batch, "step()")
    if BatchSpec.of(batch) != spec:
        given = BatchSpec.of(batch)
        raise ValueError(
            f"step() was given inputs {given.inputs} and targets {given.targets}; this state was made by init() for "
            f"inputs {spec.inputs} and targets {spec.targets}. Features in flight have those shapes: drop or pad a "
            "last partial batch, or call init() with the new shapes."
        )


def iteration(step: int) -> int:
    """t, by which Python decides what is issued.

    Raises:
      TypeError: it is traced: somebody gave the whole step to ``jax.jit``, ``jax.lax.scan`` or the like.
    """
    if isinstance(step, jax.core.Tracer):
        raise TypeError(
            "step() was called inside a JAX transformation (jit, scan, grad, ..), where state.step has no value. It is "
            "a Python loop that issues one jitted function after the other, each on its module's device: call it as "
            "it is, without jax.jit."
        )
    return int(step)  # an array, after jax.device_put of the state, is read once
