"""The jitted functions that one stage runs on its device, shared by the methods.

Every ``make_*`` function returns one jitted function. Names are the papers': ``h_in`` and ``h_out`` are a stage's
input h_{k-1} and output h_k, ``delta`` is the gradient of the loss with respect to a feature. ``loss`` is that of the
mini-batch of the gradient, for an optimizer that takes ``value=loss``, and ``()`` for others. With ``donate`` the
buffers of what is replaced are given back to XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Sharding

from fr_jax._placement import replicated
from fr_jax.algorithms._losses import gradient_norm, loss_of, metrics_of
from fr_jax.algorithms._stages import KeyStream
from fr_jax.algorithms._validation import Setup
from fr_jax.algorithms._vjp import with_weights, without_weights
from fr_jax.types import Array, LossFn, MetricsFn, PyTree, Stage


class Updated(NamedTuple):
    """A stage after an update. None: unchanged ``model_state``, ``grads`` not asked for, ``delta`` of the first."""

    params: PyTree
    model_state: PyTree | None
    opt_state: PyTree
    delta: PyTree | None
    grads: PyTree | None
    gradient_norm: Array


class Trained(NamedTuple):
    """The last stage, or a whole network, after its forward and backward pass and its update."""

    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    counts: tuple[Array, ...]
    delta: PyTree | None
    loss: Array
    grads: tuple[PyTree, ...] | None
    gradient_norms: tuple[Array, ...]
    metrics: dict[str, Array]


def _optimize(
    optimizer: optax.GradientTransformation, grads: PyTree, opt_state: PyTree, params: PyTree, loss: Array | tuple
) -> tuple[PyTree, PyTree]:
    takes_loss = isinstance(optimizer, optax.GradientTransformationExtraArgs) and not isinstance(loss, tuple)
    extra: dict[str, Any] = {"value": loss} if takes_loss else {}
    updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state


def make_play(stage: Stage, sharding: Sharding | None, *, update_stats: bool, donate: bool) -> Callable:
    """``(params, model_state, stream, h_in) -> (h_out, model_state or None, count)``: h_k = F_k(h_{k-1}; w_k)."""

    def play(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree) -> Any:
        h_out, new_state = stage.apply(params, model_state, h_in, key=stream.at(), train=True)
        return h_out, new_state if update_stats else None, stream.count + 1

    here = replicated(sharding)
    # h_in stays: the history holds it for the replay.
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
    """``(params, model_state, opt_state, stream, h_in, delta, loss) -> Updated``: replay, gradient (7), update.

    It runs after the play of mini-batch t = count - 1, and replays mini-batch s = t - staleness.
    """

    def replay(
        params: PyTree,
        model_state: PyTree,
        opt_state: PyTree,
        stream: KeyStream,
        h_in: PyTree,
        delta: PyTree,
        loss: Array | tuple = (),
    ) -> Updated:
        key = stream.at(-1 - staleness)

        def forward(params: PyTree, h_in: PyTree) -> tuple[PyTree, PyTree]:
            return stage.apply(params, model_state, h_in, key=key, train=True)

        if input_gradient:
            _, vjp, new_state = jax.vjp(forward, params, h_in, has_aux=True)
            grads, delta_in = vjp(delta)
        else:
            _, vjp, new_state = jax.vjp(lambda p: forward(p, h_in), params, has_aux=True)
            (grads,), delta_in = vjp(delta), None
        norm = gradient_norm(grads)  # of what comes in: an optimizer may clip, scale or accumulate
        params, opt_state = _optimize(optimizer, grads, opt_state, params, loss)
        # A state that is not returned is not copied: XLA would copy an unchanged one, leaf by leaf.
        new_state = new_state if update_stats else None
        return Updated(params, new_state, opt_state, delta_in, grads if return_grads else None, norm)

    here: Any = replicated(sharding)
    # The h_in of the first stage is the mini-batch, which is the caller's. A delta is not donated: it has the shape of
    # h_out, which a replay does not return, so there is nothing to put into its buffer.
    donated = (
        "params",
        "opt_state",
        *(("model_state",) if update_stats else ()),
        *(("h_in",) if input_gradient else ()),
    )
    out_shardings = Updated(
        params=here, model_state=here, opt_state=here, delta=sharding, grads=here, gradient_norm=here
    )
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

    For the last stage of a decoupled method, or for a whole network on one device (all stages).
    ``keep_input``: ``h_in`` is not given back, because a VJP that is still to be used may share its buffer.
    """

    def train(
        params: tuple,
        model_state: tuple,
        opt_state: tuple,
        streams: tuple[KeyStream, ...],
        h_in: PyTree,
        targets: PyTree,
    ) -> Trained:
        def objective(params: tuple, h: PyTree) -> tuple[Array, Any]:
            new_state = []
            for k, stage in enumerate(stages):
                h, stage_state = stage.apply(params[k], model_state[k], h, key=streams[k].at(), train=True)
                new_state.append(stage_state)
            metrics = metrics_of(metrics_fn, h, targets)
            return loss_of(loss_fn, h, targets), (tuple(new_state), metrics)

        gradient = jax.value_and_grad(objective, argnums=(0, 1) if input_gradient else (0,), has_aux=True)
        (loss, (new_state, metrics)), (grads, *delta) = gradient(params, h_in)
        updated = [_optimize(o, g, s, p, loss) for o, g, s, p in zip(optimizers, grads, opt_state, params, strict=True)]
        return Trained(
            params=tuple(p for p, _ in updated),
            model_state=new_state,
            opt_state=tuple(s for _, s in updated),
            counts=tuple(stream.count + 1 for stream in streams),
            delta=delta[0] if input_gradient else None,
            loss=loss,
            grads=grads if return_grads else None,
            gradient_norms=tuple(gradient_norm(g) for g in grads),
            metrics=metrics,
        )

    here: Any = replicated(sharding)
    donated = ("params", "model_state", "opt_state", *(("h_in",) if input_gradient and not keep_input else ()))
    out_shardings = Trained(**dict.fromkeys(Trained._fields, here))._replace(delta=sharding)
    return jax.jit(train, donate_argnames=donated if donate else (), out_shardings=out_shardings)


def make_last(setup: Setup, first: int = -1, *, keep_input: bool = False) -> Callable:
    """:func:`make_train` for the last stage of a method, or for all stages from ``first`` on."""
    return make_train(
        setup.stages[first:],
        setup.loss_fn,
        setup.optimizers[first:],
        setup.shardings[-1],
        metrics_fn=setup.metrics_fn,
        input_gradient=first % len(setup.stages) > 0,
        return_grads=setup.return_grads,
        donate=setup.donate,
        keep_input=keep_input,
    )


def make_forward(stage: Stage, *, input_gradient: bool, keep_weights: bool = True) -> Callable:
    """``(params, model_state, stream, h_in) -> (h_out, vjp, model_state, count)``: a play that keeps its VJP.

    ``vjp`` is a pytree: its leaves are the residuals, stored activations and copies of the weights that it needs; no
    weights without ``keep_weights``, for a pull that is given the same weights.
    """

    def forward(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree) -> Any:
        key = stream.at()

        def run(params: PyTree, h_in: PyTree) -> tuple[PyTree, PyTree]:
            return stage.apply(params, model_state, h_in, key=key, train=True)

        if input_gradient:
            h_out, vjp, new_state = jax.vjp(run, params, h_in, has_aux=True)
        else:
            h_out, vjp, new_state = jax.vjp(lambda p: run(p, h_in), params, has_aux=True)
        return h_out, vjp if keep_weights else without_weights(vjp, params), new_state, stream.count + 1

    # No out_shardings: they follow from the arguments, and the structure of a VJP is not known before it is traced.
    return jax.jit(forward)


def make_pull(sharding: Sharding | None, *, input_gradient: bool) -> Callable:
    """``(vjp, delta, params) -> (grads, delta_in)``: a stage's backward pass, equation (3).

    ``params`` are those of the forward pass, for a VJP that was made without weights; for others leave them out.
    """

    def pull(vjp: Callable, delta: PyTree, params: PyTree = ()) -> tuple[PyTree, PyTree | None]:
        grads, *delta_in = with_weights(vjp, params)(delta)
        return grads, delta_in[0] if input_gradient else None

    return jax.jit(pull, out_shardings=(replicated(sharding), sharding))


def make_update(
    optimizer: optax.GradientTransformation, sharding: Sharding | None, *, donate: bool, keep_params: bool = False
) -> Callable:
    """``(params, opt_state, grads, loss) -> (params, opt_state, gradient_norm)``: one optimizer step, equation (2).

    ``keep_params``: the old weights are not given back, because a stored VJP may share their buffers. That of jax 0.10
    holds copies, but no documentation promises that.
    """

    def update(
        params: PyTree, opt_state: PyTree, grads: PyTree, loss: Array | tuple = ()
    ) -> tuple[PyTree, PyTree, Array]:
        norm = gradient_norm(grads)
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, params)  # GPipe's means are wider
        return *_optimize(optimizer, grads, opt_state, params, loss), norm

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

    The last stage's forward and backward pass without an update; ``delta`` is None without ``input_gradient``.
    """

    def loss_gradient(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree, targets: PyTree) -> Any:
        key = stream.at()

        def objective(params: PyTree, h_in: PyTree) -> tuple[Array, Any]:
            h_out, new_state = stage.apply(params, model_state, h_in, key=key, train=True)
            metrics = metrics_of(metrics_fn, h_out, targets)
            return loss_of(loss_fn, h_out, targets), (new_state, metrics)

        gradient = jax.value_and_grad(objective, argnums=(0, 1) if input_gradient else (0,), has_aux=True)
        (loss, (new_state, metrics)), (grads, *delta) = gradient(params, h_in)
        return (grads, loss, metrics), delta[0] if input_gradient else None, new_state, stream.count + 1

    here = replicated(sharding)
    return jax.jit(loss_gradient, out_shardings=(here, sharding, here, here))


def make_infer(stage: Stage) -> Callable:
    """``(params, model_state, h) -> h_out``: a stage in inference mode."""
    return jax.jit(lambda params, model_state, h: stage.apply(params, model_state, h, train=False)[0])
