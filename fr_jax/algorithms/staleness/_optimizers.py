"""Optimizers for late stages: momentum that catches up, Nesterov's Adam with more momentum, and Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from fr_jax.algorithms._validation import check_between, check_count
from fr_jax.algorithms.staleness._delays import mean_delay
from fr_jax.types import Array, PyTree

__all__ = ["muon", "nadam", "spike_compensation"]


def spike_compensation(
    learning_rate: optax.ScalarOrSchedule, momentum: float, K: int, microbatches: int = 1
) -> tuple[optax.GradientTransformation, ...]:
    """SGD with momentum that makes up for what a late gradient has missed: spike compensation.

    Kosson, Chiley, Venigalla, Hestness, Köster, "Pipelined backpropagation at scale: training large models without
    batches", MLSys 2021, arXiv:2003.11666:

        v <- m v + g,  w <- w - eta (a_k v + b_k g),  a_k = m^D,  b_k = (1 - m^D) / (1 - m),  D = (K-k)/M

    A gradient that comes D updates late has missed the first D of its contributions m^i to the updates. b_k g is their
    sum, so from its arrival on it has moved the weights as far as a punctual one. D = 0 is plain momentum, D = 1 is
    Nesterov's, which therefore is no further option. To add weight decay to the gradient, chain
    ``optax.add_decayed_weights`` before each.

    Args:
      learning_rate: eta, a number or a schedule of the stage's own updates.
      momentum: m, 0 or more and below 1; 0 is plain SGD.
      K: number of stages; with 1 it is ``optax.sgd``.
      microbatches: M, as for :func:`delay`.

    Returns:
      K transformations, for a method's ``optimizer``; their states are those of ``optax.sgd``.

    Raises:
      ValueError: ``momentum`` is outside [0, 1), or K or ``microbatches`` is not a positive whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> from fr_jax.algorithms import staleness
      >>> first, *_ = staleness.spike_compensation(1.0, momentum=0.5, K=3)
      >>> u, state = first.update(jnp.ones(()), first.init(jnp.ones(())))
      >>> float(u), float(first.update(jnp.zeros(()), state)[0])
      (-1.75, -0.125)
    """
    check_between("momentum", momentum, 0, 1, "m of the optimizer, below 1")
    if momentum == 1:
        raise ValueError("momentum = 1 was given; it must be below 1, for a late gradient to have a finite effect.")
    compensated = lambda D: optax.chain(_trace(momentum, D), optax.scale_by_learning_rate(learning_rate))
    return tuple(
        compensated(D) if D and momentum else optax.sgd(learning_rate, momentum=momentum)
        for D in mean_delay(K, microbatches)
    )


def _trace(m: float, D: float) -> optax.GradientTransformation:
    """``optax.trace`` whose updates are a v + b g."""
    trace, a, b = optax.trace(m), m**D, (1 - m**D) / (1 - m)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        v, state = trace.update(updates, state, params)
        return jax.tree.map(lambda v, g: a * v + b * g, v, updates), state

    return optax.GradientTransformation(trace.init, update)


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    K: int,
    microbatches: int = 1,
    *,
    b1: float = 0.9,
    late_b1: float = 0.99,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float | None = 0.004,
) -> tuple[optax.GradientTransformation, ...]:
    """Adam with Nesterov's momentum and decoupled weight decay, with the more momentum the later a stage is.

    Ajanthan, Ramasinghe, Zuo, Avraham, Long, "Nesterov method for asynchronous pipeline parallel optimization", ICML
    2025, arXiv:2505.01099:

        b1_k = b1 + (late_b1 - b1) tau_k / K,  tau_k = (K-k)/M

    The authors' code (PluralisResearch/AsyncPP) has this ramp as an option; its script takes 0.99 for all stages, which
    is ``b1=0.99``. It trains with PyTorch's NAdam, after Dozat's: in update t = 1, 2, .. with momentum decay psi

        mu_t = b1 (1 - 0.96^{t psi} / 2),  m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        w <- (1 - eta lambda) w - eta ((1 - mu_t) g / (1 - mu_1 .. mu_t) + mu_{t+1} m / (1 - mu_1 .. mu_{t+1}))
             / (sqrt(v / (1 - b2^t)) + eps)

    So today's gradient has a weight of about a half, which falls towards 1 - b1 over thousands of updates. In
    ``optax.nadamw`` it has 1 - b1 from the start.

    Args:
      learning_rate: eta, a number or a schedule of the stage's own updates.
      K: number of stages.
      microbatches: M, as for :func:`delay`.
      b1: decay of the first moment for a stage that is not late.
      late_b1: that for a stage that is K updates late; ``b1`` makes all stages equal.
      b2: decay of the second moment.
      eps: added to its square root.
      weight_decay: lambda, times the learning rate.
      momentum_decay: psi; None is ``optax.nadamw``.

    Returns:
      K transformations, for a method's ``optimizer``.

    Raises:
      ValueError: ``b1``, ``late_b1``, ``weight_decay`` or ``momentum_decay`` is out of range, or K or ``microbatches``
        is not a positive whole number.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from fr_jax.algorithms import staleness
      >>> first, last = staleness.nadam(1e-3, K=2)
      >>> jax.tree.map(jnp.shape, first.init(jnp.ones((3, 2)))[0])
      NadamState(count=(), mu_product=(), m=(3, 2), v=(3, 2))
    """
    for name, value in (("b1", b1), ("late_b1", late_b1)):
        check_between(name, value, 0, 1, "a decay of the first moment")
    check_between("weight_decay", weight_decay, 0, float("inf"), "0 switches it off")

    def one(late: float) -> optax.GradientTransformation:
        b1_k = b1 + (late_b1 - b1) * late
        if momentum_decay is None:
            return optax.nadamw(learning_rate, b1=b1_k, b2=b2, eps=eps, weight_decay=weight_decay)
        check_between("momentum_decay", momentum_decay, 0, float("inf"), "psi of PyTorch; None is optax.nadamw")
        decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
        scale = _scale_by_nadam(b1_k, b2, eps, momentum_decay)
        return optax.chain(scale, decay, optax.scale_by_learning_rate(learning_rate))

    return tuple(one(tau / K) for tau in mean_delay(K, microbatches))


class NadamState(NamedTuple):
    """State of Adam with Nesterov's momentum: t, mu_1 .. mu_t, and the two moments."""

    count: Array
    mu_product: Array
    m: PyTree
    v: PyTree


def _scale_by_nadam(b1: float, b2: float, eps: float, momentum_decay: float) -> optax.GradientTransformation:
    """The equation of :func:`nadam` without rate and weight decay."""

    def init(params: PyTree) -> NadamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return NadamState(jnp.zeros((), jnp.int32), jnp.ones(()), zeros(), zeros())

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = lambda t: b1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay))
        mu_product = state.mu_product * mu(count)
        of_g = (1.0 - mu(count)) / (1.0 - mu_product)
        of_m = mu(count + 1) / (1.0 - mu_product * mu(count + 1))
        m = optax.tree.update_moment(updates, state.m, b1, 1)
        v = optax.tree.update_moment(updates, state.v, b2, 2)
        v_hat = optax.tree.bias_correction(v, b2, count)

        def step(g: Array, m: Array, v: Array) -> Array:
            return (of_g.astype(g.dtype) * g + of_m.astype(g.dtype) * m) / (jnp.sqrt(v) + eps)

        return jax.tree.map(step, updates, m, v_hat), NadamState(count, mu_product, m, v)

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    K: int,
    *,
    weight_decay: float = 0.0,
    output_layer_by_adam: bool = True,
    by_adam: Callable[[str, Array], bool] | None = None,
    **options: Any,
) -> tuple[optax.GradientTransformation, ...]:
    """Muon for weight matrices and Adam for the rest, at one learning rate.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024, as in ``optax.contrib.muon``. Of the
    optimizers compared under a delay of one update by Zmushko et al. 2026 (arXiv:2606.30634) it loses least. Its
    updates are scaled to be as large as Adam's (Liu et al., arXiv:2502.16982), so that both bear the same rate.

    These are matrices: dense kernels (inputs, outputs); convolution kernels (height x width x inputs, outputs); Flax's
    attention kernels, (inputs, heads x features) for query, key and value, (heads x features, outputs) for out. Adam
    takes all else (biases, normalization) and, as is usual with Muon, embedding tables and the output layer. The output
    layer is known by its place: the last layer with weights of stage K, a chain. In ``optax.contrib.muon`` this Adam
    has Nesterov's momentum, as Muon has, and no weight decay.

    Args:
      learning_rate: a number, or a schedule of the stage's own updates.
      K: number of stages.
      weight_decay: of the matrices, times the learning rate.
      output_layer_by_adam: whether Adam takes the last layer of stage K; False leaves its kernel to Muon.
      by_adam: ``(name, weight) -> bool``, which other weights Adam takes, such as
        ``lambda name, weight: "'head'" in name``. The name is the path in the stage's params, as by
        ``jax.tree_util.keystr``. None: all with "embedding" in their names.
      options: further arguments of ``optax.contrib.muon``.

    Returns:
      K transformations, for a method's ``optimizer``; all equal but the last.

    Raises:
      ValueError: K is not a positive whole number; from the last one's ``init``, with ``output_layer_by_adam``, if
        stage K is not a chain of layers (:func:`fr_jax.partition`, :func:`fr_jax.chain`).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fr_jax.algorithms import staleness
      >>> first, last = staleness.muon(0.02, K=2, weight_decay=0.1)
      >>> params = ({"kernel": jnp.ones((4, 4))}, {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)})
      >>> [len(jax.tree.leaves(one.init(params).inner_states["muon"].inner_state[0].mu)) for one in (first, last)]
      [2, 1]
    """
    check_count("K", K)
    chosen = by_adam or (lambda name, weight: "embedding" in name.lower())
    options = {"consistent_rms": 0.2, **options, "weight_decay": weight_decay}
    one = lambda last: optax_muon(
        learning_rate, muon_weight_dimension_numbers=lambda params: _as_matrices(params, chosen, last), **options
    )
    return (*(one(False),) * (K - 1), one(output_layer_by_adam))


def _as_matrices(params: PyTree, by_adam: Callable[[str, Array], bool], last: bool) -> PyTree:
    """For each weight the axes that Muon takes for a matrix's rows and columns, or None for Adam."""
    output_layer = _output_layer(params) if last else None

    def axes(path: tuple, weight: Array) -> MuonDimensionNumbers | None:
        keys = [getattr(entry, "key", None) for entry in path]
        of_output = path and output_layer is not None and getattr(path[0], "idx", None) == output_layer
        no_matrix = weight.ndim < 2 or keys[-1:] == ["bias"]  # that of an attention has two axes, heads x features
        if no_matrix or of_output or by_adam(jax.tree_util.keystr(path), weight):
            return None
        inputs = 1 if weight.ndim == 3 and {"query", "key", "value"} & {*keys} else weight.ndim - 1
        return MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, weight.ndim)))

    return jax.tree.map_with_path(axes, params)


def _output_layer(params: PyTree) -> int:
    """The place of the last layer with weights in the params of a chain, also where optax has masked some of them."""
    if not isinstance(params, tuple | list):
        raise ValueError(
            f"muon() cannot find the output layer of the last stage: its params are a {type(params).__name__}, not the "
            "tuple of a chain. Make the stage with fr_jax.chain or fr_jax.partition, or pass "
            "output_layer_by_adam=False, and by_adam to name the weights."
        )
    masked = lambda node: isinstance(node, optax.MaskedNode)
    return max((i for i, layer in enumerate(params) if jax.tree.leaves(layer, is_leaf=masked)), default=-1)
