"""What every method checks: its arguments when it is made, and the mini-batches that it is given."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
import optax
from jax.sharding import Sharding

from fr_jax._placement import check_placement, data_parallel_size, default_sharding
from fr_jax.algorithms._auxiliary import carrying
from fr_jax.algorithms._clipping import clipped
from fr_jax.algorithms._nonfinite import keeping, telling
from fr_jax.stages import check_stages, numbered
from fr_jax.types import Batch, LossFn, MetricsFn, PyTree, Stage

MICROBATCHES = " It must divide the batch size; 1 is no division."

Gradients: TypeAlias = Literal["on time", "late", "of its own"]
"""What a stage trains with: the gradient of the network's objective, now or some updates ago, or something else."""

Optimizers: TypeAlias = optax.GradientTransformation | Sequence[optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The checked arguments that all methods have; names as in their factories, one entry per stage."""

    stages: tuple[Stage, ...]
    optimizers: tuple[optax.GradientTransformation, ...]
    placement: tuple[Sharding, ...] | None
    loss_fn: LossFn
    metrics_fn: MetricsFn | None
    return_grads: bool
    donate: bool
    microbatches: int = 1
    global_clip: float | None = None
    skip_nonfinite: bool = False
    gradients: Gradients = "of its own"

    @functools.cached_property
    def shardings(self) -> tuple[Sharding, ...]:
        """The placement; without one, the default device at the first call of ``init``, ``step`` or ``predict``."""
        return self.placement or (default_sharding(),) * len(self.stages)

    @functools.cached_property
    def takes_loss(self) -> tuple[bool, ...]:
        """Whether the optimizers of the stages use ``value=loss``."""
        of_each = {optimizer: _uses_value(optimizer) for optimizer in set(self.optimizers)}
        return tuple(of_each[optimizer] for optimizer in self.optimizers)

    @property
    def waits(self) -> bool:
        """Whether the updates of a mini-batch wait for the norms of all stages' gradients."""
        return self.global_clip is not None and self.gradients == "on time" and len(self.stages) > 1

    @property
    def at_once(self) -> bool:
        """Whether the last stage's gradient and update are one function."""
        return self.microbatches == 1 and not self.waits


def _uses_value(optimizer: optax.GradientTransformation) -> bool:
    """Whether ``value=`` reaches anything in ``update``: optax.chain takes extra arguments for all its members."""
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return False
    w, value = jax.ShapeDtypeStruct((2, 2), "float32"), jax.ShapeDtypeStruct((), "float32")
    update = lambda w, value: optimizer.update(w, optimizer.init(w), w, value=value)
    try:
        jaxpr = jax.make_jaxpr(update)(w, value).jaxpr
    except Exception:  # it depends on the structure of the weights: let it have the loss
        return True
    used = [*jaxpr.outvars, *(variable for equation in jaxpr.eqns for variable in equation.invars)]
    return any(variable is jaxpr.invars[-1] for variable in used)


def check_count(name: str, value: Any, least: int = 1, why: str = "") -> int:
    """A whole number from ``least`` on; raises ValueError, with ``why`` at the end of the message."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r} was given; it must be a whole number, at least {least}.{why}")
    return int(value)


def check_between(name: str, value: Any, least: float, most: float, what: str) -> None:
    """Raises ValueError unless ``value`` is a finite number from ``least`` to ``most``; ``what`` says what it is."""
    if not isinstance(value, numbers.Real) or not least <= float(value) <= most or value == math.inf:
        bounds = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"{name} = {value!r} was given; it must be a number, {bounds}: {what}.")


def check_setup(
    stages: Sequence[Stage],
    loss_fn: LossFn,
    optimizer: Optimizers,
    placement: Sequence[Sharding] | None = None,
    return_grads: bool = False,
    donate: bool = False,
    metrics_fn: MetricsFn | None = None,
    microbatches: int = 1,
    *,
    global_clip: float | None = None,
    skip_nonfinite: bool = False,
    gradients: Gradients = "of its own",
) -> Setup:
    """Checks what every method is given, and brings it to one entry per stage. No device is asked for anything.

    Raises:
      ValueError: no stages, something that is not a Stage, a loss that is not a function, a number of optimizers or
        shardings other than K, ``microbatches`` that is not a whole number of at least 1, or ``global_clip`` below 0.
    """
    if isinstance(stages, Stage):
        stages = (stages,)
    stages = tuple(stages)
    if not stages:
        raise ValueError("0 stages were given; a network has at least one. Make them with fr_jax.partition or chain.")
    check_stages(stages, "stage")
    for name, function in ("loss_fn", loss_fn), ("metrics_fn", metrics_fn):
        if not callable(function) and (name, function) != ("metrics_fn", None):
            raise ValueError(f"{name} = {function!r} was given; it must be a function (outputs, targets) -> number(s).")
    optimizers = per_stage(optimizer, len(stages))
    shardings = None if placement is None else check_placement(placement, len(stages))
    M = check_count("microbatches", microbatches, why=MICROBATCHES)
    stages = tuple(map(carrying, numbered(stages)))
    if global_clip is not None:
        check_between("global_clip", global_clip, 0, math.inf, "the largest norm of the network's gradient")
        of_all = {optimizer: clipped(optimizer, float(global_clip)) for optimizer in optimizers}
        optimizers = tuple(of_all[optimizer] for optimizer in optimizers)  # equal ones stay equal, and compile once
    if skip_nonfinite:
        stages, loss_fn = tuple(map(keeping, stages)), telling(loss_fn)
    return Setup(
        stages,
        optimizers,
        shardings,
        loss_fn,
        metrics_fn,
        return_grads,
        donate,
        M,
        global_clip,
        skip_nonfinite,
        gradients,
    )


def per_stage(optimizer: Optimizers, K: int) -> tuple[optax.GradientTransformation, ...]:
    """One optimizer for each of K stages, or the same for all; raises ValueError for anything else."""
    one = isinstance(optimizer, optax.GradientTransformation) or not isinstance(optimizer, Sequence)
    optimizers = (optimizer,) * K if one else tuple(optimizer)
    for member in optimizers:
        if isinstance(member, optax.MultiSteps):
            raise ValueError(
                "an optax.MultiSteps was given as optimizer, which is not an optax transformation; give its "
                ".gradient_transformation()."
            )
        if not isinstance(member, optax.GradientTransformation):
            raise ValueError(
                f"optimizer {member!r} is not an optax transformation. Pass one, such as optax.sgd(0.1), for all "
                f"stages, or a sequence of {K}."
            )
    if len(optimizers) != K:
        raise ValueError(
            f"{len(optimizers)} optimizers were given for K = {K} stages. Pass one optax transformation for all of "
            f"them, or a sequence of {K}."
        )
    return optimizers


class TreeSpec(tuple):
    """Structure, shapes and dtypes of a pytree of arrays, ``(treedef, ((shape, dtype), ...))``; hashable."""

    @classmethod
    def of(cls, tree: PyTree) -> TreeSpec:
        """Read from metadata alone; dtypes are those that the arrays have on a device."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls((treedef, tuple((tuple(x.shape), str(jax.dtypes.canonicalize_dtype(x.dtype))) for x in leaves)))

    def fits(self, other: TreeSpec, *, any_size: bool) -> bool:
        """Whether ``other`` is the same; with ``any_size`` whatever the length of the first axis."""
        if not any_size or self == other:
            return self == other
        (treedef, leaves), (other_treedef, others) = self, other
        rest = lambda leaves: [(shape[1:], dtype) for shape, dtype in leaves]
        return treedef == other_treedef and rest(leaves) == rest(others)

    def __str__(self) -> str:
        treedef, leaves = self
        return str(jax.tree.unflatten(treedef, leaves))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What a state was made for (a pytree without leaves, so it is not in a checkpoint).

    Attributes:
      inputs: of a mini-batch.
      targets: of a mini-batch.
      layers: how many layers each stage has; 0 for one that is not a chain.
    """

    inputs: TreeSpec
    targets: TreeSpec
    layers: tuple[int, ...] = ()


def batch_size(batch: Batch) -> int:
    """B, the number of examples."""
    return jax.tree.leaves(batch.inputs)[0].shape[0]


def check_example(batch: Batch, called: str = "init()") -> None:
    """Raises ValueError if ``batch`` is not a mini-batch of arrays; ``called`` is the function that was given it."""
    _check_kind(batch, called)
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch[:2])}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        inputs, targets = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in batch[:2])
        raise ValueError(
            f"{called} was given inputs of shape {inputs} and targets of shape {targets}; all must have the same "
            "number of examples, at least one, along the first axis."
        )


def _check_kind(batch: Batch, called: str) -> None:
    trees = batch[:2] if isinstance(batch, Batch) else ()
    if not trees or not all(map(jax.tree.leaves, trees)) or not all(map(_is_array, jax.tree.leaves(batch))):
        kinds = f" of {type(batch.inputs).__name__} and {type(batch.targets).__name__}" if trees else ""
        raise ValueError(
            f"{called} was given a {type(batch).__name__}{kinds} as batch; it must be fr_jax.Batch(inputs, targets), "
            f"arrays or pytrees of arrays with the examples along the first axis.{_how_to_convert(batch)}"
        )


def _is_array(x: Any) -> bool:
    """Whether ``x`` is an array of numbers, or describes one, with a dtype that NumPy and JAX know."""
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype):
        return dtype.kind not in "OSUmM" and hasattr(x, "shape")
    return dtype is not None and isinstance(x, jax.Array | jax.ShapeDtypeStruct)  # a random key's, for example


def _how_to_convert(tree: PyTree) -> str:
    foreign = next((x for x in jax.tree.leaves(tree) if not _is_array(x) and hasattr(x, "numpy")), None)
    return "" if foreign is None else f" A {type(foreign).__name__} of another library becomes one by .numpy()."


def check_inputs(inputs: PyTree) -> None:
    """Raises ValueError if what ``predict`` is given is not an array, or a pytree of arrays, of as many rows."""
    leaves = jax.tree.leaves(inputs)
    if not leaves or not all(map(_is_array, leaves)):
        raise ValueError(
            f"predict() was given a {type(inputs).__name__} as inputs; it must be an array (N, ...), or a pytree of "
            f"arrays, as the inputs of a batch.{_how_to_convert(inputs)}"
        )
    if len({leaf.shape[:1] for leaf in leaves}) != 1 or not leaves[0].shape:
        shapes = jax.tree.map(lambda leaf: leaf.shape, inputs)
        raise ValueError(
            f"predict() was given inputs of shape {shapes}; all must have the same number of examples along the first "
            "axis."
        )


def check_state(state: Any, kinds: Sequence[type] = (), called: str = "step()") -> None:
    """Raises ValueError for anything but a state; of the type in ``kinds``, once ``init`` has made one."""
    right = type(state) in kinds if kinds else hasattr(state, "params") and hasattr(state, "model_state")
    if not right:
        kind = f"a {kinds[0].__name__}, which this method's" if kinds else "a state, which"
        raise ValueError(
            f"{called} was given a {type(state).__name__} as state; it must be {kind} init() or step() has returned."
        )


def check_params(params: Any, K: int, called: str = "step()") -> None:
    """Raises ValueError for the weights of a state unless there is one entry for each of K stages."""
    if not isinstance(params, Sequence) or len(params) != K:
        raise ValueError(
            f"{called} was given a state whose params are not those of K = {K} stages. Use a state of this algorithm's "
            "init() or step(); fr_jax.layer_params carries weights over."
        )


@contextlib.contextmanager
def naming_inputs(state: Any, inputs: PyTree) -> Iterator[None]:
    """Says in the library's words what ``predict`` was given, if it fails for inputs unlike those of training."""
    try:
        yield
    except Exception as error:
        given, spec = TreeSpec.of(inputs), getattr(state, "batch_spec", None)
        if isinstance(spec, BatchSpec) and not spec.inputs.fits(given, any_size=True):
            raise ValueError(
                f"predict() was given inputs {given}, for which the network fails; it was trained on {spec.inputs}, "
                "with any number of rows."
            ) from error
        raise


def check_alive(called: str, **given: PyTree) -> None:
    """Raises ValueError if an array was deleted: ``given`` by the names that they have in ``called``."""
    is_deleted = lambda leaf: isinstance(leaf, jax.Array) and leaf.is_deleted()
    for name, tree in given.items():
        if any(map(is_deleted, jax.tree.leaves(tree))):
            raise ValueError(
                f"{called} was given arrays that are gone, in {name}: a step with donate=True reuses those of its "
                "state, and a jitted function with donate_argnums its arguments. Go on from the state that step() "
                "returned, or keep old ones with donate=False."
            )


@contextlib.contextmanager
def naming_deleted(called: str, **given: PyTree) -> Iterator[None]:
    """:func:`check_alive` where JAX has met a deleted array, so that it costs nothing otherwise."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "deleted" in str(error) or "donated" in str(error):
            try:
                check_alive(called, **given)
            except ValueError as better:
                raise better from error
        raise


def check_split(batch: Batch, M: int, shardings: Sequence[Sharding]) -> None:
    """Raises ValueError if a batch cannot be split into M equal micro-batches, and these over a stage's devices."""
    B, D = batch_size(batch), math.lcm(*map(data_parallel_size, shardings))
    if M == 1 and B % D:
        raise ValueError(
            f"a batch of {B} examples cannot be split over data_parallel = {D} devices; the batch size must be a "
            f"multiple of {D}."
        )
    if B % (M * D):
        raise ValueError(
            f"a batch of {B} examples cannot be split into microbatches = {M} equal parts, each over data_parallel = "
            f"{D} device(s); the batch size must be a multiple of {M} * {D} = {M * D}. Change the batch size or the "
            "number of micro-batches; drop or pad a last partial batch."
        )


def check_batch(setup: Setup, spec: BatchSpec, batch: Batch, *, any_size: bool) -> None:
    """Raises ValueError if a batch is not like the one that the state was made for.

    ``any_size``: nothing is in flight between steps, so the number of examples may be another.
    """
    _check_kind(batch, "step()")
    layers = tuple(len(stage.layers) for stage in setup.stages)
    # 0 layers: the stage is not a chain, but may have the weights of one.
    if len(spec.layers) != len(layers) or any(a and b and a != b for a, b in zip(spec.layers, layers, strict=True)):
        raise ValueError(
            f"step() was given a state of K = {len(spec.layers)} stages with {spec.layers} layers; this algorithm has "
            f"K = {len(layers)} with {layers}. Use a state of its own init(); fr_jax.layer_params carries weights over."
        )
    inputs, targets = TreeSpec.of(batch.inputs), TreeSpec.of(batch.targets)
    if not (spec.inputs.fits(inputs, any_size=any_size) and spec.targets.fits(targets, any_size=any_size)):
        raise ValueError(
            f"step() was given inputs {inputs} and targets {targets}; this state was made by init() for "
            f"inputs {spec.inputs} and targets {spec.targets}. Features in flight have those shapes: drop or pad a "
            "last partial batch, or call init() with the new shapes."
        )
    if (inputs, targets) != (spec.inputs, spec.targets):
        check_example(batch, "step()")
        check_split(batch, setup.microbatches, setup.shardings)


def iteration(step: int) -> int:
    """t, by which Python decides what is issued.

    Raises:
      TypeError: it is traced: the whole step was given to ``jax.jit``, ``jax.lax.scan`` or the like.
    """
    if isinstance(step, jax.core.Tracer):
        raise TypeError(
            "step() was called inside a JAX transformation (jit, scan, grad, ..), where state.step has no value. It is "
            "a Python loop that issues one jitted function after the other, each on its stage's device: call it as "
            "it is, without jax.jit."
        )
    return int(step)  # an array, after jax.device_put of the state, is read once
