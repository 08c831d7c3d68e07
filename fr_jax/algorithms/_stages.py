"""What every method has before its first step: K stages with weights, states and optimizer states on their devices."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from fr_jax._arrays import place
from fr_jax._placement import jit, replicated
from fr_jax.algorithms._auxiliary import carried, check_loss, taken_apart
from fr_jax.algorithms._per_layer import with_own_keys
from fr_jax.algorithms._validation import BatchSpec, Setup, TreeSpec, check_example, check_split
from fr_jax.stages import dies_with_function
from fr_jax.types import Array, Batch, PyTree, Stage, WithLoss


class KeyStream(NamedTuple):
    """A stage's source of dropout keys: layer i draws from ``fold_in(fold_in(key, s), i)`` for micro-batch s.

    So it does in play and in replay. Layers are counted over the whole network (``stages.numbered``).

    Attributes:
      key: the same for all stages, on the stage's devices.
      count: int32 scalar on the stage's device, the number of micro-batches played (of mini-batches for M = 1). It
        stands beside ``State.step`` so that a step transfers nothing from the host.
    """

    key: Array
    count: Array

    def at(self, offset: int = 0) -> Array:
        """The key of micro-batch ``count + offset``: 0 before that micro-batch is counted as played."""
        return jax.random.fold_in(self.key, self.count + offset if offset else self.count)


class Stages(NamedTuple):
    """K stages before the first step, each on its devices.

    ``features[k]`` describes the input of stage k = 0..K-1 for a micro-batch (a mini-batch for M = 1), ``outputs`` and
    ``targets`` those of the last stage; ``key`` is for what else a method draws.
    """

    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec
    features: tuple[PyTree, ...]
    outputs: PyTree
    targets: PyTree
    key: Array

    def fields(self) -> dict[str, Any]:
        """What the state of every method has before its first step."""
        return {"step": 0} | {name: getattr(self, name) for name in self._fields[:5]}


def layers_of(stage: Stage) -> tuple[Stage, ...]:
    """The layers of a chain; a layer is its own only one."""
    return stage.layers or (stage,)


def init_stages(
    setup: Setup, key: Array, batch: Batch, params: tuple | None = None, model_state: tuple | None = None
) -> Stages:
    """Initialises every stage on its devices, from the shapes of ``batch`` alone.

    Layer i of the network, counted over all stages, draws its weights from ``fold_in(weights_key, i)``: the same key
    gives the same weights for every choice of cuts, so that methods and K start from the same point; and the same
    dropout masks. ``params`` and ``model_state`` are used instead of what would be drawn.

    Raises:
      ValueError: the key is not a key, the batch is not a mini-batch or cannot be split over the devices of a stage, a
        stage sends something on that has no gradient or returns a state of another form, or given weights do not fit.
    """
    _check_key(key)
    check_example(batch)
    check_split(batch, setup.microbatches, setup.shardings)
    counts = tuple(len(stage.layers) for stage in setup.stages)
    given_params, given_states = _by_layer("params", params, counts), _by_layer("model_state", model_state, counts)
    weights_key, dropout_key, own_key = jax.random.split(key, 3)
    h, targets = (_microbatch_spec(tree, setup.microbatches) for tree in batch[:2])
    made_params, made_states, opt_state, streams, features = [], [], [], [], []
    first, auxiliary = 0, False
    for k, (stage, optimizer, sharding) in enumerate(zip(setup.stages, setup.optimizers, setup.shardings, strict=True)):
        here, layers = replicated(sharding), layers_of(stage)
        features.append(jax.eval_shape(carried, h) if auxiliary else h)
        layer_keys = [jax.random.fold_in(weights_key, i) for i in range(first, first + len(layers))]
        stream = KeyStream(dropout_key, jnp.zeros((), jnp.int32))
        layer_keys, stream = place((layer_keys, stream), here)  # a jit runs where its arguments are
        weights, states = [], []
        for i, (layer, layer_key) in enumerate(zip(layers, layer_keys, strict=True), start=first):
            with _named_layer(k, i, h):
                p, s = _init_or_take(layer, layer_key, h, here, given_params[i], given_states[i], i)
                _check_weights(p)
                h, has_loss = _applied(setup, layer, p, s, h, dropout_key)
                auxiliary = auxiliary or has_loss
            weights.append(p)
            states.append(s)
        made_params.append(tuple(weights) if stage.layers else weights[0])
        made_states.append(tuple(states) if stage.layers else states[0])
        opt_state.append(with_own_keys(jit(optimizer.init, out_shardings=here)(made_params[k]), first))
        streams.append(stream)
        first += len(layers)
        if k < len(setup.stages) - 1:
            _check_feature(h, k + 1)
    _warn_of_narrow_weights(made_params)
    spec = BatchSpec(TreeSpec.of(batch.inputs), TreeSpec.of(batch.targets), counts)
    return Stages(
        params=tuple(made_params),
        model_state=tuple(made_states),
        opt_state=tuple(opt_state),
        streams=tuple(streams),
        batch_spec=spec,
        features=tuple(features),
        outputs=jax.eval_shape(carried, h) if auxiliary else h,
        targets=targets,
        key=own_key,
    )


def _microbatch_spec(tree: PyTree, M: int) -> PyTree:
    dtype = jax.dtypes.canonicalize_dtype
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // M, *x.shape[1:]), dtype(x.dtype)), tree)


def _check_key(key: Any) -> None:
    if not isinstance(key, jax.Array):
        raise ValueError(f"init() was given key = {key!r}; it must be a JAX random key, such as jax.random.key(0).")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim if typed else (key.ndim != 1 or key.dtype != jnp.uint32):
        raise ValueError(
            f"init() was given {key.dtype} of shape {key.shape} as key; it must be one JAX random key, such as "
            "jax.random.key(0)."
        )


@contextlib.contextmanager
def _named_layer(k: int, i: int, h: PyTree) -> Iterator[None]:
    """Adds to an exception in which layer it was raised, and for what input."""
    try:
        yield
    except Exception as error:
        given = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", h)
        error.add_note(f"This is layer {i} (from 0) of the network, in stage {k + 1}; its input is {given}.")
        raise


def _by_layer(name: str, given: tuple | None, counts: tuple[int, ...]) -> Sequence[PyTree | None]:
    """One entry per layer of the network, from one per stage or one per layer; raises ValueError for another number."""
    L = sum(count or 1 for count in counts)
    if given is None:
        return (None,) * L
    given = tuple(given)
    fits = lambda one, count: not count or (isinstance(one, tuple | list) and len(one) == count)
    if len(given) == len(counts) and all(map(fits, given, counts)):
        return [layer for one, count in zip(given, counts, strict=True) for layer in (one if count else (one,))]
    if len(given) != L:
        raise ValueError(
            f"init() was given {name} with {len(given)} entries; it must have one per stage, as in a state "
            f"(K = {len(counts)}), or one per layer (L = {L}), as fr_jax.layer_params gives them."
        )
    return given


def _init_or_take(
    layer: Stage, key: Array, h: PyTree, here: Any, params: PyTree, state: PyTree, i: int
) -> tuple[PyTree, PyTree]:
    if params is None and state is None:
        return init_layer(layer, key, h, here)
    fresh = init_layer(layer, key, h, here) if params is None or state is None else None
    specs = fresh or jax.eval_shape(lambda key: layer.init(key, _zeros(h)), key)
    taken = [
        fresh[j] if given is None else _taken(name, given, specs[j], here, i)  # type: ignore[index]
        for j, (name, given) in enumerate((("params", params), ("model_state", state)))
    ]
    return taken[0], taken[1]


def _taken(name: str, given: PyTree, like: PyTree, here: Sharding, i: int) -> PyTree:
    """A copy of given weights on a layer's devices: the caller's own stay valid when a step donates the state."""
    shapes = lambda tree: jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
    if jax.tree.structure(given) != jax.tree.structure(like) or shapes(given) != shapes(like):
        raise ValueError(
            f"init() was given {name} for layer {i} that are {shapes(given)}; this layer has {shapes(like)}. Give the "
            "weights of the same network, one entry per layer or per stage."
        )

    def copy(leaf: Any, spec: Any) -> Any:
        make = jnp.array if isinstance(leaf, jax.Array) else np.array
        return make(leaf, spec.dtype, copy=True)

    return place(jax.tree.map(copy, given, like), here)


def init_layer(layer: Stage, key: Array, h: PyTree, sharding: Sharding | None) -> tuple[PyTree, PyTree]:
    """Weights and state of a layer for an input like ``h`` (a spec), on its devices."""
    leaves, treedef = jax.tree.flatten(h)
    return _jitted_init(layer.init, treedef, tuple(leaves), sharding)(key)


@dies_with_function
def _jitted_init(init: Callable, treedef: Any, leaves: tuple, sharding: Sharding | None) -> Callable:
    """One compilation for all equal layers of a device."""
    return jit(lambda key: init(key, _zeros(treedef.unflatten(leaves))), out_shardings=sharding)


def _zeros(spec: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)


def zeros(spec: PyTree, sharding: Sharding | None) -> PyTree:
    """Zeros of the given shapes and dtypes, on a stage's devices."""
    leaves, treedef = jax.tree.flatten(spec)
    return _jitted_zeros(treedef, tuple(leaves), sharding)()


@functools.lru_cache(maxsize=1024)
def _jitted_zeros(treedef: Any, leaves: tuple, sharding: Sharding | None) -> Callable:
    """One compilation for all entries of a history."""
    return jit(lambda: _zeros(treedef.unflatten(leaves)), out_shardings=sharding)


def _applied(setup: Setup, layer: Stage, params: PyTree, state: PyTree, h: PyTree, key: Array) -> tuple[PyTree, bool]:
    """What a layer makes of an input like ``h``, and whether it has a loss of its own; checks what it returns."""
    # Shapes only: equal layers are traced once (stages.numbered), and the network is not run.
    h, moved = jax.eval_shape(layer.apply, params, state, h, key=key)
    h, losses = taken_apart(h)
    if isinstance(moved, WithLoss):
        moved, losses = moved
        check_loss(losses)
    if losses is not None and setup.gradients == "of its own":
        raise ValueError(
            "this layer has a loss of its own (fr_jax.WithLoss, or self.sow of a Flax module under 'losses'), which "
            "this method does not train with. Use backprop, gpipe, features_replay, ddg or pipedream_2bw, or take the "
            "loss out of the layer."
        )
    _check_state(state, moved)
    return h, losses is not None


def _check_weights(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} of this layer is {leaf.dtype}{list(leaf.shape)}; weights must be "
                "floating point, because they have a gradient. Let the layer's init() return it as a part of its "
                "state, (params, state)."
            )


def _warn_of_narrow_weights(params: PyTree) -> None:
    """A warning if weights are kept in less than 32 bits, in which small updates are lost."""
    kinds = {str(leaf.dtype): jnp.finfo(leaf.dtype) for leaf in jax.tree.leaves(params)}
    for dtype, info in kinds.items():
        if info.bits < 32:
            warnings.warn(
                f"this network keeps weights in {dtype}, where an update of less than {float(info.eps) / 4:.1g} of a "
                "weight is rounded away: with a small learning rate it stands still. Keep weights in float32 and "
                f"compute in {dtype} (Flax: param_dtype=float32, dtype={dtype}).",
                stacklevel=5,
            )


def _check_state(state: PyTree, moved: PyTree) -> None:
    """Raises ValueError if a layer returns another kind of state than it was given."""
    kinds = lambda tree: {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    old, new = kinds(state), kinds(moved)
    if old != new or jax.tree.structure(state) != jax.tree.structure(moved):
        differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        shown = "; ".join(
            f"{name} is {new.get(name, 'missing')} and was {old.get(name, 'missing')}" for name in differ[:3]
        )
        raise ValueError(
            f"this layer's apply() returns a state of another form than it was given: {shown or moved}. It is carried "
            "from step to step, so structure, shapes and dtypes must stay as init() made them. A Flax module whose "
            "sow() adds a value each time keeps one with reduce_fn=lambda old, new: new and a matching init_fn."
        )


def check_shapes(called: str, setup: Setup, state: Any, error: Exception) -> None:
    """Raises ValueError if weights in ``state`` have other shapes than the network's, which explains an ``error``."""
    problem = None
    with contextlib.suppress(Exception):  # of a state that is another in more than that
        problem = _other_shapes(setup, state)
    if problem:
        raise ValueError(
            f"{called} was given a state in which {problem}. Give weights of the same shapes; other shapes need an "
            "algorithm and a state of their own."
        ) from error


def _other_shapes(setup: Setup, state: Any) -> str | None:
    """Where a state has weights of other shapes than the layers make for its inputs."""
    if state.batch_spec.layers != tuple(len(stage.layers) for stage in setup.stages):
        return None  # a state of another K, which has its own message
    treedef, leaves = state.batch_spec.inputs
    h = _microbatch_spec(treedef.unflatten(jax.ShapeDtypeStruct(*leaf) for leaf in leaves), setup.microbatches)
    key = jax.random.key(0)
    for k, stage in enumerate(setup.stages):
        made = []
        for layer in layers_of(stage):
            own_params, own_state = jax.eval_shape(lambda key, init=layer.init, h=h: init(key, _zeros(h)), key)
            made.append((own_params, own_state))
            h, _ = _applied(setup, layer, own_params, own_state, h, key)
        for name, own in zip(("params", "model_state"), zip(*made, strict=True), strict=True):
            old, new = _shapes(own if stage.layers else own[0]), _shapes(getattr(state, name)[k])
            for path in {**old, **new}:
                if old.get(path) != new.get(path):
                    found, right = new.get(path, "missing"), old.get(path, "missing")
                    return f"{name}[{k}]{path} is {found}; in this algorithm's network it is {right}"
    return None


def _shapes(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"of shape {tuple(leaf.shape)}" for path, leaf in leaves}


def _check_feature(h: PyTree, k: int) -> None:
    for leaf in jax.tree.leaves(h):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"stage {k} sends {leaf.dtype} of shape {leaf.shape} to stage {k + 1}; what crosses a cut must be "
                "floating point, because a gradient is sent back for it. Move the cut."
            )
