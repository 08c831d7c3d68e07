"""The vocabulary of fr_jax: stages, batches, algorithms, and what a step returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class InitStage(Protocol):
    """``(key, x) -> (params, state)``: fresh weights for an input shaped like ``x``."""

    def __call__(self, key: Array, x: Array, /) -> tuple[PyTree, PyTree]: ...


class ApplyStage(Protocol):
    """``(params, state, x, *, key, train) -> (y, new_state)``: a pure forward pass."""

    def __call__(
        self, params: PyTree, state: PyTree, x: Array, /, *, key: Array | None = None, train: bool = True
    ) -> tuple[Array, PyTree]: ...


class Stage(NamedTuple):
    """A piece of a feedforward network as two pure functions.

    A layer is the smallest stage; a module of the papers is a chain of layers
    (:func:`fr_jax.chain`).

    Attributes:
      init: ``(key, x) -> (params, state)``. ``params`` are trained, ``state`` is
        everything else that the stage carries along, such as the running statistics of
        batch normalisation; ``()`` where there is none.
      apply: ``(params, state, x, *, key=None, train=True) -> (y, new_state)``.
        ``key`` feeds dropout; a stage without randomness ignores it.

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


class Batch(NamedTuple):
    """One mini-batch.

    Attributes:
      inputs: ``(B, ...)``, what the first stage reads.
      targets: ``(B, ...)``, what the loss compares with.
      index: ``(B,)`` int32, the examples' places in the data set; needed only by methods
        that keep something for every example (cached BlockProp).
    """

    inputs: Array
    targets: Array
    index: Array | None = None


class State(Protocol):
    """What every method carries from step to step; each adds fields of its own.

    ``params``, ``model_state`` and ``opt_state`` are tuples of K pytrees, one a stage,
    each on its stage's device. ``step`` is a Python int: the number of mini-batches seen.
    """

    @property
    def step(self) -> int: ...
    @property
    def params(self) -> tuple[PyTree, ...]: ...
    @property
    def model_state(self) -> tuple[PyTree, ...]: ...
    @property
    def opt_state(self) -> tuple[PyTree, ...]: ...


class Info(NamedTuple):
    """What a step reports and the next step does not need. Nothing in it was waited for.

    Attributes:
      loss: scalar, the loss of the mini-batch of this step at the last module.
      grads: tuple of K pytrees (``None`` for a stage that did not update in this step), or
        ``None`` without ``return_grads=True``.
      metrics: ``gradient_norm/k`` for each stage k = 1..K that updated, and whatever the
        ``metrics_fn`` of the method returned for this mini-batch.
    """

    loss: Array
    grads: tuple[PyTree, ...] | None
    metrics: dict[str, Array]


class Algorithm(NamedTuple):
    """A training method as pure functions closed over their settings.

    Attributes:
      init: ``(key, batch) -> State``; ``key`` is a ``jax.random.key``, ``batch`` gives shapes.
      step: ``(state, batch) -> (State, Info)``: one iteration t of the method. It never waits
        for a device.
      predict: ``(state, inputs) -> outputs``: the network in inference mode, on the same devices.
    """

    init: Callable[[Array, Batch], Any]
    step: Callable[[Any, Batch], tuple[Any, Info]]
    predict: Callable[[Any, Array], Array]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Shapes and dtypes of the mini-batches a state was made for (a pytree without leaves)."""

    inputs: tuple[tuple[int, ...], str]
    targets: tuple[tuple[int, ...], str]

    @classmethod
    def of(cls, batch: Batch) -> BatchSpec:
        """The spec of ``batch``, read from its metadata alone; dtypes are those that it has on a device."""
        return cls(*((tuple(x.shape), str(jax.dtypes.canonicalize_dtype(x.dtype))) for x in batch[:2]))
