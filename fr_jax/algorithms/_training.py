"""Forward and backward pass of the last stage, or of a whole network, in one jitted function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Sharding

from fr_jax._placement import jit, replicated
from fr_jax.algorithms._functions import add_up, optimize
from fr_jax.algorithms._losses import Scored, combine, quotient, score
from fr_jax.algorithms._stages import KeyStream
from fr_jax.algorithms._validation import Setup
from fr_jax.types import Array, LossFn, MetricsFn, PyTree, Stage


class Trained(NamedTuple):
    """The last stage, or a whole network, after its forward and backward pass and its update."""

    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    counts: tuple[Array, ...]
    delta: PyTree | None
    loss: Array
    grads: tuple[PyTree, ...] | None
    measured: tuple[dict[str, Array], ...]
    metrics: dict[str, Array]


class Added(NamedTuple):
    """The last stage, or a whole network, after the forward and backward pass of one of M micro-batches."""

    sums: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    counts: tuple[Array, ...]
    delta: PyTree | None
    scored: Scored


def _network_gradient(
    stages: Sequence[Stage], loss_fn: LossFn, metrics_fn: MetricsFn | None, *, of_total: bool, input_gradient: bool
) -> Callable:
    """``(params, model_state, streams, h_in, targets) -> (grads, delta, model_state, scored)`` of a few stages.

    The gradient is that of the objective, or of its total alone.
    """

    def gradient(
        params: tuple, model_state: tuple, streams: tuple[KeyStream, ...], h_in: PyTree, targets: PyTree
    ) -> Any:
        def objective(params: tuple, h: PyTree) -> tuple[Array, Any]:
            new_state = []
            for k, stage in enumerate(stages):
                h, stage_state = stage.apply(params[k], model_state[k], h, key=streams[k].at(), train=True)
                new_state.append(stage_state)
            scored = score(loss_fn, metrics_fn, h, targets)
            return scored.objective(of_total=of_total), (tuple(new_state), scored)

        run = jax.grad(objective, argnums=(0, 1) if input_gradient else (0,), has_aux=True)
        (grads, *delta), (new_state, scored) = run(params, h_in)
        return grads, delta[0] if input_gradient else None, new_state, scored

    return gradient


def make_train(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizers: Sequence[optax.GradientTransformation],
    sharding: Sharding | None,
    *,
    M: int = 1,
    metrics_fn: MetricsFn | None,
    input_gradient: bool,
    return_grads: bool,
    donate: bool,
    keep_input: bool = False,
    at_once: bool | None = None,
    skip: bool = False,
) -> Callable:
    """Loss, gradients and updates in one pass: of the last stage of a method, or of all on one device.

    ``(params, model_state, opt_state, streams, h_in, targets) -> Trained``; unless ``at_once``, M = 1 by default,
    without the updates: ``(params, model_state, streams, h_in, targets, sums) -> Added``.

    ``keep_input``: ``h_in`` is not given back, because a VJP that is still to be used may share its buffer. ``skip`` as
    for ``_functions.optimize``.
    """
    gradient = _network_gradient(stages, loss_fn, metrics_fn, of_total=M > 1, input_gradient=input_gradient)

    def train(
        params: tuple,
        model_state: tuple,
        opt_state: tuple,
        streams: tuple[KeyStream, ...],
        h_in: PyTree,
        targets: PyTree,
    ) -> Trained:
        grads, delta, new_state, scored = gradient(params, model_state, streams, h_in, targets)
        loss, _, metrics = combine([scored])
        fields = optimizers, params, opt_state, grads, new_state, model_state
        new = [optimize(o, p, s, g, loss, (m, b), skip=skip) for o, p, s, g, m, b in zip(*fields, strict=True)]
        return Trained(
            params=tuple(stage.params for stage in new),
            model_state=tuple(stage.model_state for stage in new),
            opt_state=tuple(stage.opt_state for stage in new),
            counts=tuple(stream.count + 1 for stream in streams),
            delta=delta,
            loss=loss,
            grads=grads if return_grads else None,
            measured=tuple(stage.measured for stage in new),
            metrics=metrics,
        )

    def add(
        params: tuple, model_state: tuple, streams: tuple[KeyStream, ...], h_in: PyTree, targets: PyTree, sums: tuple
    ) -> Added:
        grads, delta, new_state, scored = gradient(params, model_state, streams, h_in, targets)
        sums = tuple(g if total is None else add_up(total, g) for total, g in zip(sums, grads, strict=True))
        return Added(sums, new_state, tuple(stream.count + 1 for stream in streams), delta, scored)

    here: Any = replicated(sharding)
    donated = ("h_in",) if input_gradient and not keep_input else ()
    if not (M == 1 if at_once is None else at_once):
        add.__name__ = "train"  # in a profile
        out_shardings: Any = Added(**dict.fromkeys(Added._fields, here))._replace(delta=sharding)
        donated = donated if skip else (*donated, "model_state")  # which a dropped update puts back
        # The sums are made within the step: no state holds those of the last stage.
        return jit(add, donate_argnames=(*donated, "sums") if donate else ("sums",), out_shardings=out_shardings)
    donated = (*donated, "model_state", "params", "opt_state")
    out_shardings = Trained(**dict.fromkeys(Trained._fields, here))._replace(delta=sharding)
    return jit(train, donate_argnames=donated if donate else (), out_shardings=out_shardings)


def make_last(setup: Setup, first: int = -1, *, keep_input: bool = False) -> Callable:
    """:func:`make_train` for the last stage of a method, or for all stages from ``first`` on."""
    return make_train(
        setup.stages[first:],
        setup.loss_fn,
        setup.optimizers[first:],
        setup.shardings[-1],
        M=setup.microbatches,
        metrics_fn=setup.metrics_fn,
        input_gradient=first % len(setup.stages) > 0,
        return_grads=setup.return_grads,
        donate=setup.donate,
        keep_input=keep_input,
        at_once=setup.at_once,
        skip=setup.skip_nonfinite,
    )


def make_error(setup: Setup) -> Callable:
    """``(outputs, targets) -> (e, loss, metrics)`` on the last stage's devices: e is d loss / d outputs."""

    def error(outputs: PyTree, targets: PyTree) -> tuple[PyTree, Array, dict[str, Array]]:
        def objective(outputs: PyTree) -> tuple[Array, Scored]:
            scored = score(setup.loss_fn, setup.metrics_fn, outputs, targets)
            return quotient(*scored.loss), scored

        e, scored = jax.grad(objective, has_aux=True)(outputs)
        loss, _, metrics = combine([scored])
        return e, loss, metrics

    here: Any = replicated(setup.shardings[-1])
    return jit(error, out_shardings=(setup.shardings[-1], here, here))
