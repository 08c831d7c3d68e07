"""The vocabulary of fr_jax: stages, batches, algorithms, and what a step returns."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class InitStage(Protocol):
    """``(key, x) -> (params, state)``: fresh weights for an input shaped like ``x``."""

    def __call__(self, key: Array, x: PyTree, /) -> tuple[PyTree, PyTree]: ...


class ApplyStage(Protocol):
    """``(params, state, x, *, key, train) -> (y, new_state)``: a pure forward pass.

    A stage with a loss of its own returns ``(y, WithLoss(new_state, loss))``.
    """

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, /, *, key: Array | None = None, train: bool = True
    ) -> tuple[PyTree, PyTree]: ...


class Stage(NamedTuple):
    """A piece of a feedforward network as two pure functions.

    A layer is the smallest stage; a stage of the papers ("module") is a chain of layers (:func:`fr_jax.chain`).

    Attributes:
      init: ``(key, x) -> (params, state)``. ``params`` are trained; ``state`` is everything else that the stage carries
        along, such as the running statistics of batch normalisation, or ``()``. It keeps its structure, shapes and
        dtypes.
      apply: ``(params, state, x, *, key=None, train=True) -> (y, new_state)``. ``key`` feeds dropout; a stage without
        randomness ignores it.
      layers: the layers that the stage is a chain of; its ``params`` and ``state`` are then tuples with one entry per
        layer. Empty for a layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from fr_jax import Stage
      >>> def init(key, x):
      ...     return jnp.ones(x.shape[-1]), ()
      >>> def apply(params, state, x, *, key=None, train=True):
      ...     return x * params, state
      >>> scale = Stage(init, apply)
    """

    init: InitStage
    apply: ApplyStage
    layers: tuple[Stage, ...] = ()


class WithLoss(NamedTuple):
    """The new state of a stage, and a loss of the stage's own: the balance of a router, a penalty on activity.

    The objective of a network is its loss plus those of its stages: each adds its gradient to that of the weights of
    its stage and of all below. Methods that send the gradient of the loss down, on time or late, train with it:
    ``backprop``, ``gpipe``, ``features_replay``, ``ddg`` and ``pipedream_2bw``; the others refuse it. ``Info.loss`` is
    without it; ``Info.metrics["auxiliary_loss"]`` is the sum of those of all stages. Over micro-batches it is weighted
    as the loss is: the mean, or with a loss ``(total, weight)`` the mean with these weights.

    A Flax module says ``self.sow("losses", "balance", loss)`` instead (:func:`fr_jax.from_linen`).

    Attributes:
      state: what ``apply`` returns without it.
      loss: scalar, the mean over the mini-batch; in training only.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fr_jax as fr
      >>> def init(key, x):
      ...     return jnp.ones(()), ()
      >>> def apply(params, state, x, *, key=None, train=True):
      ...     y = x * params
      ...     return y, fr.WithLoss(state, 0.01 * jnp.mean(y**2))
      >>> fit = fr.backprop([fr.Stage(init, apply)], lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1))
      >>> batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 3)))
      >>> _, info = fit.step(fit.init(jax.random.key(0), batch), batch)
      >>> float(info.loss), round(float(info.metrics["auxiliary_loss"]), 4)
      (1.0, 0.01)
    """

    state: PyTree
    loss: Array


class Batch(NamedTuple):
    """One mini-batch of B examples.

    Attributes:
      inputs: what the first stage reads; an array, or a pytree of arrays, with leaves ``(B, ...)``.
      targets: what the loss compares with; leaves ``(B, ...)``.
      index: ``(B,)`` int32, the examples' places in the data set; needed only by methods that keep something for every
        example (cached BlockProp).
    """

    inputs: PyTree
    targets: PyTree
    index: Array | None = None


class State(Protocol):
    """What a method carries from step to step: an immutable pytree, a NamedTuple of the method's own.

    Every state has these fields; each method adds what it has in flight between steps. The tuples have one entry per
    stage, each on its stage's devices. The methods of this library also have ``streams``, the stages' dropout keys and
    micro-batch counts, and ``batch_spec``, the shapes that a batch must have.
    """

    @property
    def step(self) -> int:
        """The number of mini-batches seen, a Python int."""
        ...

    @property
    def params(self) -> tuple[PyTree, ...]:
        """The weights of the K stages."""
        ...

    @property
    def model_state(self) -> tuple[PyTree, ...]:
        """What the stages carry along in addition to weights, such as running statistics of batch normalisation."""
        ...

    @property
    def opt_state(self) -> tuple[PyTree, ...]:
        """The states of the K optimizers."""
        ...


class Info(NamedTuple):
    """What a step reports and the next step does not need. No value in it was waited for.

    Attributes:
      loss: scalar, the loss of the mini-batch of this step at the last stage.
      grads: tuple of K pytrees (``None`` for a stage that did not update in this step), or ``None`` without
        ``return_grads=True``.
      metrics: ``gradient_norm/k`` for each stage k = 1..K that updated, ``auxiliary_loss`` if a stage has one
        (:class:`WithLoss`), and whatever the ``metrics_fn`` of the method returned for this mini-batch.
    """

    loss: Array
    grads: tuple[PyTree, ...] | None
    metrics: dict[str, Array]


class LossFn(Protocol):
    """``(outputs, targets) -> scalar``: the loss of a mini-batch, the mean over its examples.

    Or ``(total, weight)``, two scalars whose quotient is the loss: the sum over the tokens that count and their number,
    for example. Over micro-batches totals and weights are added up separately, so that the loss and its gradient are
    those of the whole mini-batch, however the weight is spread; the mean of scalar losses gives every micro-batch the
    same weight. ``weight`` depends on the targets only: no gradient is taken of it. A weight of 0 counts as 1.
    """

    def __call__(self, outputs: PyTree, targets: PyTree, /) -> Array | tuple[Array, Array]: ...


class MetricsFn(Protocol):
    """``(outputs, targets) -> {name: array}``: what the last stage reports of a mini-batch beside the loss.

    A value may be a pair ``(total, weight)``, as for the loss. Over micro-batches the others are averaged.
    """

    def __call__(self, outputs: PyTree, targets: PyTree, /) -> dict[str, Array]: ...


class InitAlgorithm(Protocol):
    """``(key, batch, params=None, model_state=None) -> State``: the state before the first step.

    Args:
      key: a ``jax.random.key``. The weights and dropout masks of layer i depend on the key and on i, not on the cuts.
      batch: a mini-batch; only the shapes and dtypes of its leaves ``(B, ...)`` matter.
      params: weights to start from instead of fresh ones: a tuple of K pytrees, as in a state, or of one pytree per
        layer of the network (:func:`fr_jax.layer_params`). They are copied, and the optimizer states made from them.
      model_state: likewise for what stages carry along.

    Returns:
      The state, each stage's part on the stage's devices.

    Raises:
      ValueError: the batch is not a mini-batch, or does not fit the network or the devices; the weights have another
        structure or other shapes than the network's.
    """

    def __call__(
        self, key: Array, batch: Batch, params: tuple | None = None, model_state: tuple | None = None
    ) -> Any: ...


class Step(Protocol):
    """``(state, batch) -> (State, Info)``: one iteration t of the method.

    It only issues work, and never waits for a device: it is a Python loop over jitted functions, and not to be jitted
    itself. With ``donate=False`` (the default) the old state stays valid.

    Args:
      state: from ``init``, or from the step before.
      batch: leaves ``(B, ...)`` of the dtypes that ``init`` was given. Methods that keep nothing in flight between
        steps accept another B.

    Returns:
      The next state, and what the step reports.

    Raises:
      ValueError: the batch does not fit the state.
      TypeError: the step is called inside ``jax.jit`` or the like.
    """

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Info]: ...


class Predict(Protocol):
    """``(state, inputs) -> outputs``: the network in inference mode, each stage on its devices.

    Args:
      state: any state of the method.
      inputs: leaves ``(N, ...)``, for any N.

    Returns:
      The outputs of the last stage, leaves ``(N, ...)``.
    """

    def __call__(self, state: Any, inputs: PyTree, /) -> PyTree: ...


class Algorithm(NamedTuple):
    """A training method as pure functions closed over their settings.

    Attributes:
      init: :class:`InitAlgorithm`, ``(key, batch, params=None, model_state=None) -> State``.
      step: :class:`Step`, ``(state, batch) -> (State, Info)``.
      predict: :class:`Predict`, ``(state, inputs) -> outputs``.
    """

    init: InitAlgorithm
    step: Step
    predict: Predict
