"""The jitted functions that one stage runs on its device, shared by the methods.

Every ``make_*`` function returns one jitted function. Names are the papers': ``h_in`` and ``h_out`` are a stage's
input h_{k-1} and output h_k, ``delta`` is the gradient of the loss with respect to a feature. ``told`` is what an
update needs of the gradient's mini-batch beside it. With ``donate`` the buffers of what is replaced are given back to
XLA.

With one update per mini-batch of M > 1 micro-batches, gradients are added to ``sums``, in float32 at least, and
:func:`make_update` divides them. With M = 1 gradient and update are one function wherever that is possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax._placement import jit, replicated
from fr_jax.algorithms._clipping import others_are_finite, with_others
from fr_jax.algorithms._losses import NOTHING, Told, gradient_norm, quotient
from fr_jax.algorithms._nonfinite import settled
from fr_jax.algorithms._stages import KeyStream
from fr_jax.algorithms._vjp import with_weights, without_weights
from fr_jax.types import Array, PyTree, Stage


class Updated(NamedTuple):
    """A stage after an update. None: unchanged ``model_state``, ``grads`` not asked for, ``delta`` of the first."""

    params: PyTree
    model_state: PyTree | None
    opt_state: PyTree
    delta: PyTree | None
    grads: PyTree | None
    measured: dict[str, Array]


class Stepped(NamedTuple):
    """A stage after its optimizer's step.

    Attributes:
      measured: what ``Info.metrics`` has of it, under these names and the stage's number.
      model_state: None if it was not given.
      grads: the mean over M > 1 micro-batches, None if not asked for.
    """

    params: PyTree
    opt_state: PyTree
    measured: dict[str, Array]
    model_state: PyTree | None
    grads: PyTree | None = None


def optimize(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    loss: Array | tuple,
    statistics: tuple[PyTree, PyTree] | None = None,
    *,
    skip: bool = False,
) -> Stepped:
    """One optimizer step; ``loss`` is ``()`` for an optimizer that takes none.

    ``statistics``: the stage's own state after and before the mini-batch. ``skip``: all stays as it was before the
    mini-batch if the gradient is not finite.
    """
    norm = gradient_norm(grads)  # of what comes in: an optimizer may clip, scale or accumulate
    takes_loss = isinstance(optimizer, optax.GradientTransformationExtraArgs) and not isinstance(loss, tuple)
    extra: dict[str, Any] = {"value": loss} if takes_loss else {}
    narrow = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, params)
    updates, new_state = _updated(optimizer, narrow, opt_state, params, extra)
    moved, before = statistics or (None, None)
    new, measured = (optax.apply_updates(params, updates), new_state, moved), {"gradient_norm": norm}
    if skip:
        finite = jnp.isfinite(norm) & others_are_finite(opt_state)
        measured["skipped"] = (~finite).astype(jnp.int32)
        new = settled(finite, new, (params, with_others(opt_state, None), before))
    return Stepped(new[0], new[1], measured, new[2])


def _updated(
    optimizer: optax.GradientTransformation, grads: PyTree, opt_state: PyTree, params: PyTree, extra: dict[str, Any]
) -> tuple[PyTree, PyTree]:
    """``optimizer.update``; a ValueError if it needs what the methods do not have."""
    try:
        return optimizer.update(grads, opt_state, params, **extra)
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        given = "value=loss and nothing else" if extra else "no value=loss"
        raise ValueError(
            f"the optimizer's update cannot be called ({error}): this stage gives it {given}. Choose another "
            "optimizer, or another method than dni, whose stages below the last do not know the loss; what takes "
            "value=loss is an optax.GradientTransformationExtraArgs."
        ) from error


def add_up(sums: PyTree, grads: PyTree) -> PyTree:
    """``sums`` with one more gradient, in their own type."""
    return jax.tree.map(lambda total, g: total + g.astype(total.dtype), sums, grads)


def make_play(stage: Stage, sharding: Sharding | None, *, update_stats: bool, donate: bool) -> Callable:
    """``(params, model_state, stream, h_in) -> (h_out, model_state or None, count)``: h_k = F_k(h_{k-1}; w_k)."""

    def play(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree) -> Any:
        h_out, new_state = stage.apply(params, model_state, h_in, key=stream.at(), train=True)
        return h_out, new_state if update_stats else None, stream.count + 1

    here = replicated(sharding)
    # h_in stays: the history holds it for the replay.
    donated = "model_state" if donate and update_stats else ()
    return jit(play, donate_argnames=donated, out_shardings=(sharding, here, here))


def _replayed(stage: Stage, staleness: int, *, input_gradient: bool, update_stats: bool) -> Callable:
    """``(weights, model_state, stream, h_in, delta) -> (grads, delta_in, model_state or None)``."""

    def gradient(
        params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree, delta: PyTree
    ) -> tuple[PyTree, PyTree | None, PyTree | None]:
        key = stream.at(-1 - staleness)

        def forward(params: PyTree, h_in: PyTree) -> tuple[PyTree, PyTree]:
            return stage.apply(params, model_state, h_in, key=key, train=True)

        if input_gradient:
            _, vjp, new_state = jax.vjp(forward, params, h_in, has_aux=True)
            grads, delta_in = vjp(delta)
        else:
            _, vjp, new_state = jax.vjp(lambda p: forward(p, h_in), params, has_aux=True)
            (grads,), delta_in = vjp(delta), None
        # A state that is not returned is not copied: XLA would copy an unchanged one, leaf by leaf.
        return grads, delta_in, new_state if update_stats else None

    return gradient


def make_replay(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    sharding: Sharding | None,
    *,
    M: int = 1,
    staleness: int,
    input_gradient: bool,
    update_stats: bool,
    return_grads: bool,
    donate: bool,
    keep_params: bool = False,
    skip: bool = False,
) -> Callable:
    """Replay, gradient (7) and, for M = 1, update.

    ``(params, model_state, opt_state, stream, h_in, delta, told, weights) -> Updated``; for M > 1
    ``(params, model_state, stream, h_in, delta, sums, weights) -> (sums, model_state or None, delta_in)``.

    It runs after the play of micro-batch i = count - 1, and replays micro-batch s = i - staleness, at ``params`` or at
    other ``weights``. ``keep_params``: the old weights are not given back, because something in flight holds them.
    """
    gradient = _replayed(stage, staleness, input_gradient=input_gradient, update_stats=update_stats)

    def replay(
        params: PyTree,
        model_state: PyTree,
        opt_state: PyTree,
        stream: KeyStream,
        h_in: PyTree,
        delta: PyTree,
        told: Told = NOTHING,
        weights: PyTree | None = None,
    ) -> Updated:
        at = params if weights is None else weights
        grads, delta_in, new_state = gradient(at, model_state, stream, h_in, delta)
        statistics = (new_state, model_state) if update_stats else None
        new = optimize(optimizer, params, opt_state, grads, told.loss, statistics, skip=skip)
        grads = grads if return_grads else None
        return Updated(new.params, new.model_state, new.opt_state, delta_in, grads, new.measured)

    def add(weights: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree, delta: PyTree, sums: PyTree) -> Any:
        grads, delta_in, new_state = gradient(weights, model_state, stream, h_in, delta)
        return add_up(sums, grads), new_state, delta_in

    here: Any = replicated(sharding)
    # The h_in of the first stage is the mini-batch, which is the caller's. A delta is not donated: it has the shape of
    # h_out, which a replay does not return, so there is nothing to put into its buffer.
    donated = (*(("model_state",) if update_stats else ()), *(("h_in",) if input_gradient else ()))
    if M > 1:
        add.__name__ = "replay"  # in a profile
        return jit(add, donate_argnames=(*donated, "sums") if donate else (), out_shardings=(here, here, sharding))
    donated = (*donated, "opt_state", *(() if keep_params else ("params",)))
    out_shardings = Updated(**dict.fromkeys(Updated._fields, here))._replace(delta=sharding)
    return jit(replay, donate_argnames=donated if donate else (), out_shardings=out_shardings)


def make_forward(stage: Stage, *, input_gradient: bool, keep_weights: bool = True) -> Callable:
    """``(params, model_state, stream, h_in) -> (h_out, vjp, model_state, count)``: a play that keeps its VJP.

    ``vjp`` is a pytree: its leaves are the residuals, stored activations and copies of the weights that it needs; no
    weights without ``keep_weights``, for a pull that is given the same weights.
    """

    def run(params: PyTree, model_state: PyTree, key: Array, h_in: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        apply = lambda params, h_in: stage.apply(params, model_state, h_in, key=key, train=True)
        if input_gradient:
            return jax.vjp(apply, params, h_in, has_aux=True)
        return jax.vjp(lambda p: apply(p, h_in), params, has_aux=True)

    def forward(params: PyTree, model_state: PyTree, stream: KeyStream, h_in: PyTree) -> Any:
        arguments = params, model_state, stream.at(), h_in
        h_out, vjp, new_state = run(*arguments) if keep_weights else without_weights(run, *arguments)
        return h_out, vjp, new_state, stream.count + 1

    # No out_shardings: they follow from the arguments, and the structure of a VJP is not known before it is traced.
    return jax.jit(forward)


def make_pull(sharding: Sharding | None, *, input_gradient: bool, donate_sums: bool = True) -> Callable:
    """``(vjp, delta, params, sums) -> (grads or sums, delta_in)``: a stage's backward pass, equation (3).

    ``params`` are those of the forward pass, for a VJP that was made without weights; for others leave them out. With
    ``sums`` the gradients are added to them.
    """

    def pull(vjp: Callable, delta: PyTree, params: PyTree = (), sums: PyTree = None) -> tuple[PyTree, PyTree | None]:
        grads, *delta_in = with_weights(vjp, params)(delta)
        return grads if sums is None else add_up(sums, grads), delta_in[0] if input_gradient else None

    donated = "sums" if donate_sums else ()
    return jit(pull, donate_argnames=donated, out_shardings=(replicated(sharding), sharding))


def make_update(
    optimizer: optax.GradientTransformation,
    sharding: Sharding | None,
    *,
    M: int = 1,
    donate: bool,
    keep_params: bool = False,
    return_grads: bool = False,
    skip: bool = False,
) -> Callable:
    """``(params, opt_state, grads, told, statistics) -> Stepped``: one optimizer step, equation (2).

    ``grads`` are the gradient, or for M > 1 the sums of those of M micro-batches. ``keep_params``: the old weights are
    not given back, because something in flight holds them. ``statistics`` and ``skip`` as for :func:`optimize`.
    """

    def update(
        params: PyTree, opt_state: PyTree, grads: PyTree, told: Told = NOTHING, statistics: tuple | None = None
    ) -> Stepped:
        grads = _mean(grads, told, M)
        new = optimize(optimizer, params, opt_state, grads, told.loss, statistics, skip=skip)
        return new._replace(grads=grads if return_grads and M > 1 else None)

    # Sums are not donated: they are in float32 at least, the weights may be narrower, and most optimizers return
    # nothing else in their shape.
    donated = ("opt_state",) if keep_params else ("params", "opt_state")
    return jit(update, donate_argnames=donated if donate else (), out_shardings=replicated(sharding))


def _mean(sums: PyTree, told: Told, M: int) -> PyTree:
    """The gradient of a mini-batch from the sums over its M micro-batches."""
    if M == 1:
        return sums
    weight = told.weight
    return jax.tree.map(
        lambda g: g / M if isinstance(weight, tuple) else quotient(g, weight.astype(g.dtype)),
        sums,
    )


def make_norm(sharding: Sharding | None, *, M: int = 1) -> Callable:
    """``(grads, told) -> norm`` of what :func:`make_update` is given."""
    return jit(lambda grads, told: gradient_norm(_mean(grads, told, M)), out_shardings=replicated(sharding))


def make_infer(stage: Stage) -> Callable:
    """``(params, model_state, h) -> h_out``: a stage in inference mode."""
    return jax.jit(lambda params, model_state, h: stage.apply(params, model_state, h, train=False)[0])
