"""Decoupled neural interfaces (Jaderberg et al. 2016, arXiv:1608.05343): stages update by synthetic gradients.

At iteration t, for stages k = 1..K with weights w_k, inputs h_{k-1} (h_0 = x) and synthesizers M_k, k < K:

    forward      h_k^t = F_k(h_{k-1}^t; w_k^t),  sent to stage k+1
    synthesize   d_k^t = M_k(h_k^t),  or M_k(h_k^t, y) where it is conditioned on the labels (cDNI)
    gradient     g_k^t = (dh_k^t / dw_k) . d_k^t
    update       w_k^{t+1} = w_k^t - gamma_t g_k^t
    send         delta_{k-1}^t = (dh_k^t / dh_{k-1}) . d_k^t  to stage k-1
    learn        M_k takes a step of its own optimizer on  B ||d_k^t - delta_k^t||^2

Stage K's d is the gradient of the loss itself. Stages do not wait for what the stage above sends; synthesizers do.
Their error is a sum over features and a mean over examples of (B d_k - B delta_k)^2, so its size does not depend on B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from fr_jax._arrays import place
from fr_jax._placement import jit, replicated
from fr_jax.algorithms import _functions as functions
from fr_jax.algorithms._microbatches import Shared, make_shared
from fr_jax.algorithms._nonfinite import keeping
from fr_jax.algorithms._stages import KeyStream, init_layer, init_stages
from fr_jax.algorithms._step import Iteration, make_algorithm
from fr_jax.algorithms._training import make_last
from fr_jax.algorithms._validation import BatchSpec, Optimizers, Setup, check_setup
from fr_jax.types import Algorithm, Array, Batch, Info, LossFn, MetricsFn, PyTree, Stage

__all__ = ["DNIState", "dni"]


class Synthesizer(NamedTuple):
    """M_k on stage k's devices: its weights, running statistics, optimizer state and dropout keys."""

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    stream: KeyStream


class DNIState(NamedTuple):
    """The fields of every state (:class:`fr_jax.types.State`), and what the method keeps; nothing is in flight.

    Attributes:
      synthesizers: M_k for k < K.
    """

    step: int
    params: tuple[PyTree, ...]
    model_state: tuple[PyTree, ...]
    opt_state: tuple[PyTree, ...]
    synthesizers: tuple[Synthesizer, ...]
    streams: tuple[KeyStream, ...]
    batch_spec: BatchSpec


class SynthesizerSetup(NamedTuple):
    """The checked arguments for M_k, k < K: stages, their optimizer, and whether they see the labels."""

    stages: tuple[Stage, ...]
    optimizer: optax.GradientTransformation
    label_conditioning: bool


def init(
    own: SynthesizerSetup,
    setup: Setup,
    parts: DNIParts,
    key: Array,
    batch: Batch,
    params: tuple | None,
    model_state: tuple | None,
) -> DNIState:
    """Weights w^0, and those of the synthesizers."""
    stages = init_stages(setup, key, batch, params, model_state)
    targets = jax.tree.map(
        lambda y: jax.ShapeDtypeStruct(y.shape, jax.dtypes.canonicalize_dtype(y.dtype)), batch.targets
    )
    synthesizers = []
    for k, stage in enumerate(own.stages):
        here, h = replicated(setup.shardings[k]), stages.features[k + 1]
        seen = (h, targets) if own.label_conditioning else h
        weights_key, dropout_key = jax.random.split(jax.random.fold_in(stages.key, k))
        weights_key, stream = place((weights_key, KeyStream(dropout_key, jnp.zeros((), jnp.int32))), here)
        M_params, M_state = init_layer(stage, weights_key, seen, here)
        predicted, _ = jax.eval_shape(stage.apply, M_params, M_state, seen, key=dropout_key)
        _check_prediction(predicted, h, k + 1)
        opt_state = jit(own.optimizer.init, out_shardings=here)(M_params)
        synthesizers.append(Synthesizer(M_params, M_state, opt_state, stream))
    return DNIState(**stages.fields(), synthesizers=tuple(synthesizers))


def _check_prediction(predicted: PyTree, h: PyTree, k: int) -> None:
    like = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    if like(predicted) != like(h):
        raise ValueError(
            f"synthesizer {k} returns {predicted}; it predicts the gradient with respect to the output of stage {k}, "
            f"so it must return {h}. Change its output layer."
        )


class DNIParts(NamedTuple):
    """The jitted functions of the stages k < K, of their synthesizers, and the last stage's one pass."""

    forwards: tuple[Callable, ...]
    pulls: tuple[Callable, ...]
    synthesizes: tuple[Callable, ...]
    errors: tuple[Callable, ...]
    learns: tuple[Callable, ...]
    last: Callable
    shared: Shared


def make_parts(setup: Setup, own: SynthesizerSetup) -> DNIParts:
    """Forward, backward and update for each stage k < K and for its synthesizer, and the last stage."""
    stages, shardings, donate = setup.stages, setup.shardings, setup.donate
    below = range(len(stages) - 1)
    return DNIParts(
        forwards=tuple(functions.make_forward(stages[k], input_gradient=k > 0) for k in below),
        pulls=tuple(functions.make_pull(shardings[k], input_gradient=k > 0) for k in below),
        synthesizes=tuple(functions.make_forward(stage, input_gradient=False) for stage in own.stages),
        errors=tuple(make_error(shardings[k]) for k in below),
        learns=tuple(
            functions.make_update(own.optimizer, shardings[k], donate=donate, skip=setup.skip_nonfinite) for k in below
        ),
        last=make_last(setup, keep_input=True),  # the VJP of M_{K-1} may share its buffer
        shared=make_shared(setup),
    )


def make_error(sharding: Sharding | None) -> Callable:
    """``(vjp, predicted, delta) -> (grads, error)``: gradient of the error B ||d - delta||^2 for a synthesizer."""

    def error(vjp: Callable, predicted: PyTree, delta: PyTree) -> tuple[PyTree, Array]:
        B = jax.tree.leaves(predicted)[0].shape[0]
        difference = jax.tree.map(jnp.subtract, predicted, delta)
        (grads,) = vjp(jax.tree.map(lambda leaf: 2 * B * leaf, difference))
        return grads, B * optax.tree.norm(difference, squared=True)

    return jit(error, out_shardings=replicated(sharding))


def step(own: SynthesizerSetup, setup: Setup, parts: DNIParts, state: DNIState, batch: Batch) -> tuple[DNIState, Info]:
    """Iteration t. Everything is only issued here, in the order in which each device should work on it."""
    now, K = Iteration(setup, state, batch, parts.shared, any_size=True), len(setup.stages)
    synthesizers, lessons = list(state.synthesizers), []
    sent: list[PyTree] = [None] * K

    # Stages k < K: forward, send; synthesize, gradient, update, send.
    h = now.send(batch.inputs, 0)
    for k in range(K - 1):
        h_out, vjp = now.forward(k, parts.forwards[k], h)
        h = now.send(h_out, k + 1)
        seen = (h_out, now.send(batch.targets, k)) if own.label_conditioning else h_out
        M = synthesizers[k]
        d, vjp_M, M_state, count = parts.synthesizes[k](M.params, M.model_state, M.stream, seen)
        synthesizers[k] = M._replace(model_state=M_state, stream=M.stream._replace(count=count))
        lessons.append((vjp_M, d))
        sent[k] = now.pull(k, parts.pulls[k], vjp, d)
        vjp = seen = h_out = None  # nothing here keeps alive what has been used
        now.update(k)

    # Stage K: forward, backward and update in one pass.
    sent[-1] = now.train(parts.last, h, batch.targets)

    # Synthesizers learn from what the stage above sent in this iteration.
    for k, (vjp_M, d) in enumerate(lessons):
        M, delta = synthesizers[k], now.send(sent[k + 1], k)
        M_grads, now.metrics[f"synthesizer_error/{k + 1}"] = parts.errors[k](vjp_M, d, delta)
        M_params, M_opt_state, *_ = parts.learns[k](M.params, M.opt_state, M_grads)
        synthesizers[k] = M._replace(params=M_params, opt_state=M_opt_state)

    return now.finish(state, synthesizers=synthesizers)


def check_synthesizers(
    synthesizers: Stage | Sequence[Stage],
    optimizer: optax.GradientTransformation,
    label_conditioning: bool,
    K: int,
    skip_nonfinite: bool = False,
) -> SynthesizerSetup:
    """One synthesizer for all of the K-1 features, or a sequence of K-1; raises ValueError for anything else."""
    given = (synthesizers,) * (K - 1) if isinstance(synthesizers, Stage) else tuple(synthesizers or ())
    if len(given) != K - 1:
        raise ValueError(
            f"{len(given)} synthesizers were given for K = {K} stages; there is one for each of the K-1 = {K - 1} "
            "features that cross a cut. Pass a sequence of that many, or a single Stage for all of them."
        )
    for k, stage in enumerate(given, start=1):
        if not isinstance(stage, Stage):
            raise ValueError(
                f"synthesizer {k} is {stage!r}; each must be an fr_jax.Stage: fr_jax.models.synthesizer()."
            )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"synthesizer_optimizer {optimizer!r} is not an optax transformation. Pass one, such as optax.adam(1e-3)."
        )
    given = tuple(map(keeping, given)) if skip_nonfinite else given
    return SynthesizerSetup(given, optimizer, label_conditioning)


def dni(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    synthesizers: Stage | Sequence[Stage],
    synthesizer_optimizer: optax.GradientTransformation,
    *,
    label_conditioning: bool = False,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    skip_nonfinite: bool = False,
) -> Algorithm:
    """Decoupled neural interfaces, DNI (Jaderberg et al. 2016), as compared with in the features replay paper.

    Args:
      stages: the K stages.
      loss_fn: ``(outputs, targets) -> scalar``, the mean over the batch.
      optimizer: one optax transformation for all stages, or a sequence of K. Each stage runs its own: a global norm to
        clip by is that of the stage's gradient. ``update`` receives ``value=loss`` in stage K only: the others update
        before the loss is known.
      synthesizers: M_k for the output h_k of each stage k < K: K-1 stages, or one for all. Its input is h_k, or
        ``(h_k, targets)`` with ``label_conditioning``; its output has the shape and dtype of h_k and stands for the
        gradient of ``loss_fn`` (the mean over the batch) with respect to h_k. See :func:`fr_jax.models.synthesizer`.
      synthesizer_optimizer: one optax transformation for all synthesizers.
      label_conditioning: whether synthesizers see the targets (cDNI).
      placement: one sharding per stage (:func:`fr_jax.placement`); None puts all on the default device. M_k lives
        where stage k does.
      return_grads: also return each stage's gradient in ``Info.grads``.
      donate: reuse the buffers of the old state; it is then invalid after ``step``.
      metrics_fn: ``(outputs, targets) -> dict`` of further metrics of the mini-batch, computed by stage K.
      skip_nonfinite: a stage whose gradient is not finite drops its update of that mini-batch: weights, optimizer and
        statistics stay as they are. ``Info.metrics["skipped/k"]`` is then 1, else 0. Synthesizers do likewise.

    Returns:
      The algorithm; its metrics hold ``synthesizer_error/k``, B ||d_k - delta_k||^2. K = 1 is plain back-propagation.

    Raises:
      ValueError: on a wrong number of stages, optimizers, synthesizers or shardings; from ``init`` and ``step`` on a
        batch that does not fit, and from ``init`` on a synthesizer that returns another shape than it must.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import fr_jax as fr
      >>> stages = [fr.from_linen(nn.Dense(8)), fr.from_linen(nn.Dense(1))]
      >>> loss_fn = lambda y, z: jnp.mean((y - z) ** 2)
      >>> fit = fr.dni(stages, loss_fn, optax.sgd(0.1), fr.models.synthesizer(), optax.adam(1e-3))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 1)))
      >>> state = fit.init(jax.random.key(0), batch)
      >>> state, info = fit.step(state, batch)
      >>> sorted(info.metrics)
      ['gradient_norm/1', 'gradient_norm/2', 'synthesizer_error/1']
    """
    setup = check_setup(
        stages, loss_fn, optimizer, placement, return_grads, donate, metrics_fn, skip_nonfinite=skip_nonfinite
    )
    own = check_synthesizers(synthesizers, synthesizer_optimizer, label_conditioning, len(setup.stages), skip_nonfinite)
    return make_algorithm(
        setup, functools.partial(init, own), functools.partial(step, own), lambda: make_parts(setup, own)
    )
