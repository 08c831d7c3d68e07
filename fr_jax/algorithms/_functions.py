"""The jitted steps that one module runs on its device, shared by the methods.

Every ``make_*`` function returns one jitted function. Names are the papers': ``h_in`` and ``h_out`` are a
module's input h_{k-1} and output h_k, ``delta`` is the gradient of the loss with respect to a feature.
With ``donate`` the buffers of what is replaced are given back to XLA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Sharding

from fr_jax._arrays import put
from fr_jax._placement import replicated
from fr_jax.algorithms._losses import LossFn, MetricsFn, gradient_norm, loss_of, metrics_of
from fr_jax.algorithms._stages import KeyStream
from fr_jax.types import Array, PyTree, Stage


def _optimize(optimizer: optax.GradientTransformation, grads: PyTree, opt_state: PyTree, params: PyTree) -> Any:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


class Updated(NamedTuple):
    """A module after an update. None: unchanged ``model_state``, ``grads`` not asked for, ``delta`` of the first."""

    params: PyTree
    model_state: PyTree | None
    opt_state: PyTree
    delta: PyTree | None
    grads: PyTree | None
    gradient_norm: Array


class Trained(NamedTuple):
    """The last module, or a whole network, after its forward and backward pass and its update."""

    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    counts: tuple[Array, ...]
    delta: PyTree | None
    loss: Array
    grads: tuple[PyTree, ...] | None
    gradient_norms: tuple[Array, ...]
    metrics: dict[str, Array]


def make_play(stage: Stage, sharding: Sharding | None, *, update_stats: bool, donate: bool) -> Callable:
    """``(params, model_state, stream, h_in) -> (h_out, model_state or None, count)``: h_k = F_k(h_{k-1}; w_k)."""

    def play(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree) -> Any:
        key = jax.random.fold_in(stream.key, stream.count)
        h_out, new_state = stage.apply(params, model_state, h_in, key=key, train=True)
        return h_out, new_state if update_stats else None, stream.count + 1

    here = replicated(sharding)
    donated = "model_state" if donate and update_stats else ()
    return jax.jit(play, donate_argnames=donated, out_shardings=(sharding, here, here))


def make_replay(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    sharding: Sharding | None,
    *,
    staleness: int,
    input_gradient: bool,
    update_stats: bool,
    return_grads: bool,
    donate: bool,
) -> Callable:
    """``(params, model_state, opt_state, stream, h_in, delta) -> Updated``: replay, gradient (7), update.

    It runs after the play of mini-batch t = count - 1, and replays mini-batch s = t - staleness.
    """

    def replay(
        params: PyTree, model_state: PyTree, opt_state: PyTree, stream: KeyStream, h_in: PyTree, delta: PyTree
    ) -> Updated:
        key = jax.random.fold_in(stream.key, stream.count - 1 - staleness)

        def forward(params: PyTree, h_in: PyTree) -> tuple[PyTree, PyTree]:
            return stage.apply(params, model_state, h_in, key=key, train=True)

        if input_gradient:
            _, vjp, new_state = jax.vjp(forward, params, h_in, has_aux=True)
            grads, delta_in = vjp(delta)
        else:
            _, vjp, new_state = jax.vjp(lambda p: forward(p, h_in), params, has_aux=True)
            (grads,), delta_in = vjp(delta), None
        norm = gradient_norm(grads)
        params, opt_state = _optimize(optimizer, grads, opt_state, params)
        new_state = new_state if update_stats else None  # XLA would copy the old one, leaf by leaf
        return Updated(params, new_state, opt_state, delta_in, grads if return_grads else None, norm)

    here = replicated(sharding)
    donated = (
        "params",
        "opt_state",
        *(("model_state",) if update_stats else ()),
        *(("h_in",) if input_gradient else ()),
    )
    out_shardings = Updated._make((here, here, here, sharding, here, here))
    return jax.jit(replay, donate_argnames=donated if donate else (), out_shardings=out_shardings)


def make_train(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizers: Sequence[optax.GradientTransformation],
    sharding: Sharding | None,
    *,
    metrics_fn: MetricsFn | None,
    input_gradient: bool,
    return_grads: bool,
    donate: bool,
    keep_input: bool = False,
) -> Callable:
    """``(params, model_state, opt_state, streams, h_in, targets) -> Trained``: loss, gradients, updates in one pass.

    For the last module of a decoupled method (one stage), or for a whole network on one device (all stages).
    ``keep_input``: ``h_in`` is not given back, because a VJP that is still to be used may share its buffer.
    """

    def train(
        params: tuple,
        model_state: tuple,
        opt_state: tuple,
        streams: tuple[KeyStream, ...],
        h_in: PyTree,
        targets: Array,
    ) -> Trained:
        def objective(params: tuple, h: PyTree) -> tuple[Array, Any]:
            new_state = []
            for k, stage in enumerate(stages):
                key = jax.random.fold_in(streams[k].key, streams[k].count)
                h, stage_state = stage.apply(params[k], model_state[k], h, key=key, train=True)
                new_state.append(stage_state)
            metrics = metrics_of(metrics_fn, h, targets)
            return loss_of(loss_fn, h, targets), (tuple(new_state), metrics)

        gradient = jax.value_and_grad(objective, argnums=(0, 1) if input_gradient else (0,), has_aux=True)
        (loss, (new_state, metrics)), (grads, *delta) = gradient(params, h_in)
        updated = [_optimize(o, g, s, p) for o, g, s, p in zip(optimizers, grads, opt_state, params, strict=True)]
        return Trained(
            tuple(p for p, _ in updated),
            new_state,
            tuple(s for _, s in updated),
            tuple(stream.count + 1 for stream in streams),
            delta[0] if input_gradient else None,
            loss,
            grads if return_grads else None,
            tuple(gradient_norm(g) for g in grads),
            metrics,
        )

    here = replicated(sharding)
    donated = ("params", "model_state", "opt_state", *(("h_in",) if input_gradient and not keep_input else ()))
    out_shardings = Trained._make((here, here, here, here, sharding, here, here, here, here))
    return jax.jit(train, donate_argnames=donated if donate else (), out_shardings=out_shardings)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Weight:
    """Stands in a VJP for a leaf of its module's ``params`` (a pytree without leaves).

    Attributes:
      leaf: which one, in the order of ``jax.tree.leaves(params)``.
    """

    leaf: int


def without_weights(vjp: PyTree, params: PyTree) -> PyTree:
    """The VJP of a jitted function with a :class:`Weight` for every residual that *is* a leaf of ``params``.

    A jitted function returns such a residual as a new array: a copy of the weight.
    """
    place = {id(leaf): Weight(i) for i, leaf in enumerate(jax.tree.leaves(params))}
    return jax.tree.map(lambda residual: place.get(id(residual), residual), vjp)


def with_weights(vjp: PyTree, params: PyTree) -> PyTree:
    """The VJP that :func:`without_weights` took apart, at ``params``."""
    leaves, is_weight = jax.tree.leaves(params), lambda node: isinstance(node, Weight)
    return jax.tree.map(lambda node: leaves[node.leaf] if is_weight(node) else node, vjp, is_leaf=is_weight)


def make_forward(stage: Stage, *, input_gradient: bool, keep_weights: bool = True) -> Callable:
    """``(params, model_state, stream, h_in) -> (h_out, vjp, model_state, count)``: a play that keeps its VJP.

    ``vjp`` is a pytree: its leaves are the residuals, stored activations and copies of the weights that it needs; no
    weights without ``keep_weights``, for a pull that is given the same weights.
    """

    def forward(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree) -> Any:
        key = jax.random.fold_in(stream.key, stream.count)

        def run(params: PyTree, h_in: PyTree) -> tuple[PyTree, PyTree]:
            return stage.apply(params, model_state, h_in, key=key, train=True)

        if input_gradient:
            h_out, vjp, new_state = jax.vjp(run, params, h_in, has_aux=True)
        else:
            h_out, vjp, new_state = jax.vjp(lambda p: run(p, h_in), params, has_aux=True)
        return h_out, vjp if keep_weights else without_weights(vjp, params), new_state, stream.count + 1

    return jax.jit(forward)


def make_pull(sharding: Sharding | None, *, input_gradient: bool) -> Callable:
    """``(vjp, delta, params) -> (grads, delta_in)``: a module's backward pass, equation (3).

    ``params`` are those of the forward pass, for a VJP that was made without weights; for others leave them out.
    """

    def pull(vjp: Callable, delta: PyTree, params: PyTree = ()) -> tuple[PyTree, PyTree | None]:
        grads, *delta_in = with_weights(vjp, params)(delta)
        return grads, delta_in[0] if input_gradient else None

    return jax.jit(pull, out_shardings=(replicated(sharding), sharding))


def make_update(
    optimizer: optax.GradientTransformation, sharding: Sharding | None, *, donate: bool, keep_params: bool = False
) -> Callable:
    """``(params, opt_state, grads) -> (params, opt_state, gradient_norm)``: one optimizer step, equation (2).

    ``keep_params``: the old weights are not given back, because a stored VJP may share their buffers (that of jax 0.10
    has copies, which nobody promises).
    """

    def update(params: PyTree, opt_state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree, Array]:
        norm = gradient_norm(grads)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, params)  # GPipe's means are wider
        return *_optimize(optimizer, grads, opt_state, params), norm

    donated = ("opt_state",) if keep_params else ("params", "opt_state")
    return jax.jit(update, donate_argnames=donated if donate else (), out_shardings=replicated(sharding))


def make_loss_gradient(
    stage: Stage,
    loss_fn: LossFn,
    sharding: Sharding | None,
    *,
    metrics_fn: MetricsFn | None,
    input_gradient: bool,
) -> Callable:
    """``(params, model_state, stream, h_in, targets) -> ((grads, loss, metrics), delta, model_state, count)``.

    The last module's forward and backward pass without an update; ``delta`` is None without ``input_gradient``.
    """

    def loss_gradient(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree, targets: Array) -> Any:
        key = jax.random.fold_in(stream.key, stream.count)

        def objective(params: PyTree, h_in: PyTree) -> tuple[Array, Any]:
            h_out, new_state = stage.apply(params, model_state, h_in, key=key, train=True)
            metrics = metrics_of(metrics_fn, h_out, targets)
            return loss_of(loss_fn, h_out, targets), (new_state, metrics)

        gradient = jax.value_and_grad(objective, argnums=(0, 1) if input_gradient else (0,), has_aux=True)
        (loss, (new_state, metrics)), (grads, *delta) = gradient(params, h_in)
        return (grads, loss, metrics), delta[0] if input_gradient else None, new_state, stream.count + 1

    here = replicated(sharding)
    return jax.jit(loss_gradient, out_shardings=(here, sharding, here, here))


def make_predict(stages: Sequence[Stage], shardings: Sequence[Sharding | None]) -> Callable:
    """``(state, inputs) -> outputs``: the network in inference mode, each module on its device."""

    def infer(stage: Stage) -> Callable:
        return jax.jit(lambda params, model_state, h: stage.apply(params, model_state, h, train=False)[0])

    modules = tuple(infer(stage) for stage in stages)

    def predict(state: Any, inputs: PyTree) -> PyTree:
        h = inputs
        for k, module in enumerate(modules):
            h = module(state.params[k], state.model_state[k], put(h, shardings[k]))
        return h

    return predict


def named_norms(norms: Sequence[Array | None]) -> dict[str, Array]:
    """``{"gradient_norm/k": norm}`` for the modules k = 1..K that updated."""
    return {f"gradient_norm/{k}": norm for k, norm in enumerate(norms, start=1) if norm is not None}
