"""The devices of stages: one device per stage, or a mesh of D devices over which the batch is split."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fr_jax.types import PyTree

__all__ = [
    "check_placement",
    "data_parallel_size",
    "default_sharding",
    "jit",
    "placement",
    "replicated",
    "resting",
    "without_context_mesh",
]

DATA, SHARDS = "data", "shards"
"""The axis of a stage's mesh; by its name it says whether the weights are copied to each device or split, too."""


def placement(
    K: int, devices: Sequence[jax.Device] | None = None, data_parallel: int = 1, *, shard_params: bool = False
) -> tuple[Sharding, ...]:
    """Chooses the devices of K stages.

    The devices are taken in groups of ``data_parallel``. Stage k gets group k, round robin if there are fewer groups
    than stages.

    Args:
      K: number of stages.
      devices: the devices to use; all of ``jax.devices()`` by default.
      data_parallel: D, devices per stage. With D > 1 the batch (leading axis) is split over them, the weights are
        copied to each, and XLA adds up the gradients.
      shard_params: split the weights over the D devices of a stage, too, and with them gradients and what optimizers
        keep: each array along its largest axis that D divides (:func:`resting`). XLA gathers weights where they are
        used. A device then holds about 1/D of them between the functions of a step.

    Returns:
      One sharding per stage, for arrays with a batch axis: a ``SingleDeviceSharding``, or a ``NamedSharding`` over
      the axis ``"data"``, or ``"shards"`` for split weights. :func:`replicated` gives that of the weights.

    Raises:
      ValueError: K or D is less than one, there are fewer than D devices, or weights are to be split over one.

    Example:
      >>> len(placement(4))
      4
    """
    devices = list(jax.devices() if devices is None else devices)
    if K < 1:
        raise ValueError(f"placement() was given K = {K}; K must be at least 1.")
    if not devices:
        raise ValueError("placement() was given no devices; pass at least one, or None for all of jax.devices().")
    if not 1 <= data_parallel <= len(devices):
        raise ValueError(
            f"data_parallel = {data_parallel} devices per stage were asked for; with {len(devices)} device(s) it can "
            f"be 1 to {len(devices)}. Use fewer, or give JAX more devices (on a CPU: --devices N, or "
            'jax.config.update("jax_num_cpu_devices", N) before anything else).'
        )
    if shard_params and data_parallel == 1:
        raise ValueError(
            "shard_params = True with data_parallel = 1 splits the weights over a single device. Give "
            f"data_parallel = D, from 2 to the {len(devices)} device(s) there are, or drop shard_params."
        )
    groups = [devices[i : i + data_parallel] for i in range(0, len(devices) - data_parallel + 1, data_parallel)]
    axis = SHARDS if shard_params else DATA
    return tuple(_sharding(groups[k % len(groups)], axis) for k in range(K))


def _sharding(group: Sequence[jax.Device], axis: str) -> Sharding:
    if len(group) == 1:
        return SingleDeviceSharding(group[0])
    return NamedSharding(Mesh(np.asarray(group), (axis,), axis_types=(AxisType.Auto,)), PartitionSpec(axis))


def replicated(sharding: Sharding | None) -> Sharding | None:
    """The sharding of what has no batch axis (weights, scalars) on the same devices.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> replicated(NamedSharding(mesh, PartitionSpec("data"))).spec == PartitionSpec()
      True
    """
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _splits_weights(sharding: Any) -> bool:
    """Whether it is :func:`replicated` of a stage whose weights are split."""
    return isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (SHARDS,) and not any(sharding.spec)


def resting(sharding: Any, shape: Sequence[int]) -> Any:
    """Where an array that was to be placed with ``sharding`` lies: split where a stage splits its weights.

    Example:
      >>> mesh = jax.make_mesh((1,), ("shards",), axis_types=(AxisType.Auto,))
      >>> tuple(resting(NamedSharding(mesh, PartitionSpec()), (3, 8, 4)).spec)
      (None, 'shards', None)
    """
    if not _splits_weights(sharding):
        return sharding
    D = sharding.num_devices
    axis = max((axis for axis, size in enumerate(shape) if size % D == 0), key=lambda axis: shape[axis], default=None)
    return NamedSharding(sharding.mesh, PartitionSpec(*(SHARDS if i == axis else None for i in range(len(shape)))))


def jit(function: Callable, *, out_shardings: Any, **options: Any) -> Callable:
    """``jax.jit``, but for outputs that would be :func:`replicated` and whose stage splits its weights."""
    known = lambda leaf: leaf is None or isinstance(leaf, Sharding)
    leaves, structure = jax.tree.flatten(out_shardings, is_leaf=known)
    if not any(map(_splits_weights, leaves)):
        return jax.jit(function, out_shardings=out_shardings, **options)

    def lay(sharding: Sharding | None, part: PyTree) -> PyTree:
        if not _splits_weights(sharding):
            return part
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, resting(sharding, x.shape)), part)

    @functools.wraps(function)
    def laid_out(*arguments: Any, **named: Any) -> Any:
        return jax.tree.map(lay, out_shardings, function(*arguments, **named), is_leaf=known)

    others = structure.unflatten(None if _splits_weights(leaf) else leaf for leaf in leaves)
    return jax.jit(laid_out, out_shardings=others, **options)


def data_parallel_size(sharding: Sharding | None) -> int:
    """D, the number of parts into which the batch is split: not all axes of a mesh need split it.

    Example:
      >>> [data_parallel_size(sharding) for sharding in placement(2)]
      [1, 1]
    """
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return 1
    axes = sharding.spec[0]
    return math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def without_context_mesh() -> AbstractContextManager[Any]:
    """A context in which the placement of the stages counts, and no mesh that the caller has set.

    Under ``jax.set_mesh`` a jitted function spreads what it makes over that mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    try:
        return jax.set_mesh(None)  # type: ignore[arg-type]  # it takes None
    except ValueError:  # inside a transformation, which step() refuses
        return contextlib.nullcontext()


def default_sharding() -> Sharding:
    """JAX's default device, as it is now.

    Example:
      >>> default_sharding() == placement(1, [jax.local_devices()[0]])[0]
      True
    """
    default: Any = jax.config.values["jax_default_device"]  # None, a device, or the name of a platform
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return SingleDeviceSharding(default)


def check_placement(shardings: Sequence[Sharding], K: int) -> tuple[Sharding, ...]:
    """One sharding for each of K stages.

    Raises:
      ValueError: the placement does not have K entries, or an entry is not a sharding.

    Example:
      >>> len(check_placement(placement(2), 2))
      2
    """
    if isinstance(shardings, Sharding):
        raise ValueError(
            f"placement is the single sharding {shardings!r}; it needs a sequence of K = {K}, one per stage. "
            f"Use fr_jax.placement({K}, devices) to make one from devices."
        )
    shardings = tuple(shardings)
    if len(shardings) != K:
        raise ValueError(
            f"placement has {len(shardings)} entries for K = {K} stages; it needs one sharding per stage. "
            f"Use fr_jax.placement({K}), which goes round robin if devices are few, or placement=None."
        )
    for k, sharding in enumerate(shardings, start=1):
        if not isinstance(sharding, Sharding):
            raise ValueError(
                f"placement entry {k} is {sharding!r}; each must be a jax.sharding.Sharding. "
                f"Use fr_jax.placement({K}, devices) to make one from devices."
            )
    return shardings
