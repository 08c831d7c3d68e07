"""Direct feedback alignment (Nøkland 2016, arXiv:1609.01596): the output's error reaches every stage directly.

At iteration t, for stages k = 1..K with weights w_k and inputs h_{k-1} (h_0 = x), and with fixed random B_k, k < K:

    forward   h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to stage k+1
    error     e^t = d loss / d h_K^t,  sent to all stages
    feedback  delta_k^t = B_k e^t,  k < K;   delta_K^t = e^t
    gradient  g_k^t = (dh_k^t / dw_k) . delta_k^t
    update    w_k^{t+1} = w_k^t - gamma_t g_k^t

Stages wait for e^t and not for each other: all backward passes run at once, and none sends anything on. The paper has a
B_k for every hidden layer, which is one stage per layer; a stage of several layers back-propagates delta_k within
itself. As in the author's code (dfa-torch), B_k is uniform between -1 and 1 over the square root of the number of
features of h_k, and delta_k is the gradient with respect to what the stage sends on, after its activation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from fr_jax._arrays import place
from fr_jax._placement import jit, replicated
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._losses import Told
from fr_jax.algorithms._microbatches import Shared, make_shared
from fr_jax.algorithms._stages import KeyStream, init_layer, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_error
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["DirectFeedbackAlignmentState", "direct_feedback_alignment"]

Feedback: TypeAlias = "tuple[PyTree | Callable[[PyTree], PyTree] | None, ...]"
"""What is given for B_1..B_{K-1}: arrays, functions e -> delta_k, or None for one that is drawn."""


class DirectFeedbackAlignmentState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`), and what the method keeps; nothing is in flight.

    Attributes:
      feedback: B_k on stage k's devices, for outputs ``(B, ..., C)`` and features ``(B, ..., *rest)`` an array
        ``(C, *rest)``; ``()`` for the last stage, and where the feedback is a function.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    feedback: tuple[PyTree, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


def init(
    own: Feedback,
    setup: Setup,
    parts: DirectFeedbackAlignmentParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> DirectFeedbackAlignmentState:
    """Weights w^0 and B_k."""
    stages = init_stages(setup, key, batch, params, model_state)
    feedback: list[PyTree] = []
    for k, given in enumerate(own, start=1):
        e, h = stages.outputs, stages.features[k]
        here = replicated(setup.shardings[k - 1])
        if callable(given):
            _check_same(f"feedback function {k} returns", _kinds(jax.eval_shape(given, e)), _kinds(h), k)
            feedback.append(())
            continue
        _check_positions(e, h, k)
        drawn_key = place(jax.random.fold_in(stages.key, k), here)
        specs, _ = jax.eval_shape(FEEDBACK.init, drawn_key, (e, h))
        if given is None:
            feedback.append(init_layer(FEEDBACK, drawn_key, (e, h), here)[0])
        else:
            shapes = lambda tree: jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
            _check_same(f"feedback {k} has shape", shapes(given), shapes(specs), k)
            feedback.append(place(jax.tree.map(lambda B, spec: jnp.asarray(B, spec.dtype), given, specs), here))
    return DirectFeedbackAlignmentState(**stages.fields(), feedback=(*feedback, ()))


def _draw(key: Array, x: tuple[PyTree, PyTree]) -> tuple[PyTree, tuple[()]]:
    """B_k for an error and features like ``x``: one array per leaf of the features."""
    e, h = x
    leaves, treedef = jax.tree.flatten(h)
    n = sum(math.prod(leaf.shape[e.ndim - 1 :]) for leaf in leaves)
    draw = lambda key, leaf: jax.random.uniform(
        key, (e.shape[-1], *leaf.shape[e.ndim - 1 :]), leaf.dtype, -1 / math.sqrt(n), 1 / math.sqrt(n)
    )
    return treedef.unflatten(map(draw, jax.random.split(key, len(leaves)), leaves)), ()


def _feed(B: PyTree, state: tuple[()], e: Array, /, **options: Any) -> tuple[PyTree, tuple[()]]:
    """delta_k = B_k e, for each example and, of a sequence, each position."""
    return jax.tree.map(lambda B: jnp.tensordot(e.astype(B.dtype), B, axes=1), B), state


FEEDBACK = Stage(_draw, _feed)


def _kinds(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)


def _check_same(what: str, given: PyTree, expected: PyTree, k: int) -> None:
    if given != expected:
        raise ValueError(
            f"{what} {given}; for these outputs and what stage {k} sends on it must be {expected}. Change it, or leave "
            "feedback out to have it drawn."
        )


def _check_positions(e: PyTree, h: PyTree, k: int) -> None:
    """Raises ValueError unless B_k can act on the last axis of the error at each position of the features."""
    leaves = jax.tree.leaves(h)
    single = isinstance(e, jax.ShapeDtypeStruct) and e.ndim > 1
    if not single or any(leaf.shape[: e.ndim - 1] != e.shape[:-1] for leaf in leaves):
        raise ValueError(
            f"feedback {k} is an array that acts on the last axis of the error, at every position that it has before "
            f"that axis; the network returns {_kinds(e)}, and stage {k} sends on {_kinds(h)}. Give feedback as "
            "functions e -> delta, one per stage but the last."
        )


class DirectFeedbackAlignmentParts(NamedTuple):
    """The jitted functions of the K stages; ``feeds`` are those of 1..K-1."""

    forwards: tuple[Callable, ...]
    error: Callable
    feeds: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    shared: Shared


def make_parts(setup: Setup, own: Feedback) -> DirectFeedbackAlignmentParts:
    """Forward and backward of every stage, which takes no gradient of its input; the error, and its way to a stage."""
    return DirectFeedbackAlignmentParts(
        forwards=tuple(functions.make_forward(s, input_gradient=False, keep_weights=False) for s in setup.stages),
        error=make_error(setup),
        feeds=tuple(map(make_feed, own, setup.shardings)),
        pulls=tuple(functions.make_pull(sharding, input_gradient=False) for sharding in setup.shardings),
        shared=make_shared(setup),
    )


def make_feed(given: Any, sharding: Sharding | None) -> Callable:
    """``(B, e) -> delta``: the feedback of one stage, k < K."""

    def feed(B: PyTree, e: PyTree) -> PyTree:
        return given(e) if callable(given) else FEEDBACK.apply(B, (), e)[0]

    return jit(feed, out_shardings=sharding)


def step(
    setup: Setup, parts: DirectFeedbackAlignmentParts, state: DirectFeedbackAlignmentState, batch: Batch
) -> tuple[DirectFeedbackAlignmentState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now, K = Iteration(setup, state, batch, parts.shared, any_size=True), len(setup.stages)
    vjps: list[Any] = []

    # Forward, one stage after the other.
    h = now.send(batch.inputs, 0)
    for k in range(K):
        h, vjp = now.forward(k, parts.forwards[k], now.send(h, k))
        vjps.append(vjp)

    # The error at the outputs goes to all stages.
    e, now.loss, metrics = parts.error(h, now.send(batch.targets, -1))
    now.told, now.metrics = Told(now.loss), now.metrics | metrics
    errors, feeds = [now.send(e, k) for k in range(K)], (*parts.feeds, lambda B, e: e)
    h = vjp = e = None  # nothing here keeps alive what has been used

    # Backward: no stage waits for another's. A delta has no name, so that it is free after its stage's pull.
    for k in reversed(range(K)):
        now.pull(k, parts.pulls[k], vjps.pop(), feeds[k](state.feedback[k], errors.pop()), now.params[k])
        now.update(k, now.told_for(k))

    return now.finish(state)


def check_feedback(feedback: Sequence[Any] | None, K: int) -> Feedback:
    """One entry for each stage but the last; raises ValueError for another number."""
    if feedback is None:
        return (None,) * (K - 1)
    given = tuple(feedback)
    if len(given) != K - 1 or any(one is None for one in given):
        raise ValueError(
            f"feedback has {len(given)} entries for K = {K} stages; it needs one for each of the K-1 = {K - 1} stages "
            "below the last, arrays or functions e -> delta. Leave it out to have it drawn."
        )
    return given


def direct_feedback_alignment(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    feedback: Sequence[Any] | None = None,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """Direct feedback alignment, DFA (Nøkland 2016).

    No gradient is late, and the last stage's is exact. The others' point where the loss falls only after their weights
    have aligned with B_k: :mod:`fr_jax.diagnostics.sufficient_direction` measures it. The method is known to train
    dense networks, and to fail on convolutions.

    Args:
      stages: the K stages; one per layer for the method of the paper.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch, or ``(total, weight)``, whose quotient is the
        loss.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss``.
      feedback: B_1..B_{K-1}, or None to draw them from the key of ``init``. For outputs ``(B, ..., C)`` and features
        h_k ``(B, ..., *rest)`` an array ``(C, *rest)``, or a pytree of such arrays like h_k; or a function e -> delta_k
        that can be traced, for what no array can do. They never change.
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device. B_k lives
        where stage k does.
      return_grads: also return each stage's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights, optimizer and
        statistics stay as they are. ``Info.metrics["skipped/k"]`` is then 1, else 0.

    Returns:
      The algorithm. K = 1 is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers, shardings or feedbacks; from ``init`` on feedback of another
        shape than it must have, or outputs and features that no array fits; from ``init`` and ``step`` on a batch that
        does not fit.

    Example:
      >>> import flax.linen as nn, fr_jax as fr, jax, jax.numpy as jnp, optax
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> fit = fr.direct_feedback_alignment(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state, info = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> state.feedback[0].shape
      (1, 8)
    """
    setup = check_setup(
        stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn, skip_nonfinite=skip_nonfinite
    )
    own = check_feedback(feedback, len(setup.stages))
    return make_algorithm(setup, functools.partial(init, own), step, lambda: make_parts(setup, own))
