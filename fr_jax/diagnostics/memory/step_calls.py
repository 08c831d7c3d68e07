"""The jitted functions that one step of a method issues, found and compiled without running anything.

``step`` is Python that calls jitted functions and sends arrays to devices. Tracing it with shapes instead of arrays
gives the list of these calls in the order of issue, each with the buffers that it reads and makes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Sharding, SingleDeviceSharding

from fr_jax.types import Algorithm, Batch, PyTree

__all__ = ["Buffer", "Call", "StepCalls", "step_calls"]


Progress: TypeAlias = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
    """An array (``aval``: shape and dtype) on its devices. Each object is one allocation."""

    aval: Any
    sharding: Sharding

    @property
    def nbytes(self) -> int:
        """Bytes on each of its devices."""
        return int(np.prod(self.sharding.shard_shape(self.aval.shape), dtype=int)) * self.aval.dtype.itemsize

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding for ``jit``."""
        return jax.ShapeDtypeStruct(self.aval.shape, self.aval.dtype, sharding=self.sharding)


@dataclasses.dataclass(frozen=True)
class Call:
    """One jitted function as a step issues it, or a transfer between devices."""

    name: str  # of the function: play, replay, ...
    devices: frozenset[jax.Device]  # where it runs, or the receivers of the transfer
    inputs: tuple[Buffer, ...]
    donated: tuple[Buffer, ...]  # the inputs whose memory it may reuse
    outputs: tuple[Buffer, ...]  # new buffers
    aliased: int  # bytes per device of the outputs in donated memory
    temporaries: int  # bytes per device that XLA needs in addition to inputs and outputs


@dataclasses.dataclass(frozen=True)
class StepCalls:
    """One step: its calls in the order of issue; its arguments and results, pytrees of :class:`Buffer`, no ``step``."""

    calls: tuple[Call, ...]
    state: PyTree
    batch: PyTree
    new_state: PyTree
    info: PyTree


def step_calls(
    algorithm: Algorithm, batch: Batch, *, progress: Progress | None = None, analyses: dict[Any, Any] | None = None
) -> StepCalls:
    """Traces ``init`` and a step in which every stage updates, and compiles the functions that the step issues.

    A batch of ``jax.ShapeDtypeStruct`` stands for arrays on the default device. The algorithm's functions must not read
    the values of arrays; those of fr_jax do not. ``progress`` is called with the name of each function before it is
    compiled. ``analyses`` is a cache from code to memory analyses, to be passed to several calls.

    Raises:
      ValueError: the batch does not suit the algorithm.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fr_jax as fr
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
      >>> fit = fr.features_replay(stages, lambda y, t: jnp.mean(y), optax.sgd(0.1))
      >>> batch = fr.Batch(jax.ShapeDtypeStruct((4, 784), "float32"), jax.ShapeDtypeStruct((4,), "int32"))
      >>> [call.name for call in step_calls(fit, batch).calls]
      ['play', 'train', 'replay']
    """
    walk = _Walk(progress or (lambda name: None), {} if analyses is None else analyses)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), batch)
    places = [getattr(x, "sharding", None) or walk.default for x in jax.tree.leaves(batch)]
    batch_buffers = [Buffer(leaf, place) for leaf, place in zip(jax.tree.leaves(spec), places, strict=True)]

    key = jax.random.key(0)
    # state.step is an int that the method's Python code reads: it cannot be traced.
    without_step = lambda key, batch: algorithm.init(key, batch)._replace(step=None)
    traced, state_spec = jax.make_jaxpr(without_step, return_shape=True)(key, spec)
    _, state_buffers = walk.follow(traced, [Buffer(jax.typeof(key), walk.default), *batch_buffers], compiling=False)

    # Iteration K is the first in which all stages update. init may have put one zeros buffer into several entries; by
    # now each has its own.
    t, state_buffers = len(state_spec.params), [dataclasses.replace(buffer) for buffer in state_buffers]

    def step(state: Any, batch: Batch) -> tuple[Any, PyTree]:
        new_state, info = algorithm.step(state._replace(step=t), batch)
        return new_state._replace(step=None), info

    traced, (new_spec, info_spec) = jax.make_jaxpr(step, return_shape=True)(state_spec, spec)
    calls, made = walk.follow(traced, [*state_buffers, *batch_buffers], compiling=True)
    count = len(jax.tree.leaves(new_spec))
    fill = lambda spec, buffers: jax.tree.unflatten(jax.tree.structure(spec), buffers)
    return StepCalls(
        calls=tuple(calls),
        state=fill(state_spec, state_buffers),
        batch=fill(spec, batch_buffers),
        new_state=fill(new_spec, made[:count]),
        info=fill(info_spec, made[count:]),
    )


class _Walk:
    """Follows the equations of a traced function; equal calls are compiled once."""

    def __init__(self, progress: Progress, analyses: dict[Any, Any]) -> None:
        self.default = SingleDeviceSharding(jax.devices()[0])
        self._progress, self._analyses = progress, analyses
        self._seen: dict[Any, tuple[Any, tuple[Sharding, ...]]] = {}

    def follow(self, traced: Any, arguments: list[Buffer], *, compiling: bool) -> tuple[list[Call], list[Buffer]]:
        """The calls of a traced function of ``arguments``, and its outputs."""
        known: dict[Any, Buffer] = dict(zip(traced.jaxpr.invars, arguments, strict=True))
        known |= {var: Buffer(var.aval, self.default) for var in traced.jaxpr.constvars}
        at = lambda atom: Buffer(atom.aval, self.default) if isinstance(atom, core.Literal) else known[atom]
        calls = []
        for equation in traced.jaxpr.eqns:
            inputs = tuple(map(at, equation.invars))
            kind = equation.primitive.name
            if kind == "device_put":
                call, outputs = _transfer(equation, inputs)
            elif kind in ("jit", "pjit"):
                call = self._call(equation, inputs, compiling)
                outputs = call.outputs
            else:  # an operation outside of jit is compiled as a function of its own
                outputs = tuple(Buffer(var.aval, _place(inputs, self.default)) for var in equation.outvars)
                call = Call(kind, frozenset(outputs[0].sharding.device_set), inputs, (), outputs, 0, 0)
            calls += [] if call is None else [call]
            known |= zip(equation.outvars, outputs, strict=True)
        return calls, [at(atom) for atom in traced.jaxpr.outvars]

    def _call(self, equation: Any, inputs: tuple[Buffer, ...], compiling: bool) -> Call:
        params, place = equation.params, _place(inputs, self.default)
        asked = [s if isinstance(s, Sharding) else None for s in params["out_shardings"]]
        placed = tuple(s or place for s in asked)
        memory = None
        # Outputs without an out_sharding go where XLA puts them; on one device there is only one place.
        if len(place.device_set) > 1 and (compiling or None in asked):
            memory, placed = self._compile(params, [buffer.spec for buffer in inputs], asked)
        elif compiling:  # for the default device: one compilation serves all devices
            specs = [jax.ShapeDtypeStruct(buffer.aval.shape, buffer.aval.dtype) for buffer in inputs]
            memory, _ = self._compile(params, specs, [None] * len(asked))
        donated = tuple(b for b, given in zip(inputs, params["donated_invars"], strict=True) if given)
        outputs = tuple(Buffer(var.aval, s) for var, s in zip(equation.outvars, placed, strict=True))
        devices = frozenset(placed[0].device_set if placed else place.device_set)
        sizes = (memory.alias_size_in_bytes, memory.temp_size_in_bytes) if memory else (0, 0)
        return Call(params["name"], devices, inputs, donated, outputs, *sizes)

    def _compile(
        self, params: Any, specs: list[jax.ShapeDtypeStruct], asked: list[Sharding | None]
    ) -> tuple[Any, tuple[Sharding, ...]]:
        """XLA's memory analysis, and where it puts the outputs."""
        function, donated = params["jaxpr"], params["donated_invars"]
        same = (function, donated, tuple(asked), tuple(spec.sharding for spec in specs))
        if same not in self._seen:
            donate = tuple(i for i, given in enumerate(donated) if given)
            jitted = jax.jit(core.jaxpr_as_fun(function), donate_argnums=donate, out_shardings=asked)
            lowered = jitted.lower(*specs)
            code = hashlib.sha256(lowered.as_text().encode()).digest(), same[2:]
            if code not in self._analyses:
                self._progress(params["name"])
                compiled = lowered.compile()
                self._analyses[code] = compiled.memory_analysis(), tuple(compiled.output_shardings)
            self._seen[same] = self._analyses[code]
        return self._seen[same]


def _place(inputs: tuple[Buffer, ...], default: Sharding) -> Sharding:
    return next((buffer.sharding for buffer in inputs), default)


def _transfer(equation: Any, inputs: tuple[Buffer, ...]) -> tuple[Call | None, tuple[Buffer, ...]]:
    """New buffers for arrays that move, the same buffers for those that are in place."""
    outputs = []
    for buffer, target in zip(inputs, equation.params["devices"], strict=True):
        sharding = SingleDeviceSharding(target) if isinstance(target, jax.Device) else target
        stays = sharding is None or sharding.is_equivalent_to(buffer.sharding, len(buffer.aval.shape))
        outputs.append(buffer if stays else Buffer(buffer.aval, sharding))
    new = tuple(b for b in outputs if b not in inputs)
    devices = functools.reduce(frozenset.union, (frozenset(b.sharding.device_set) for b in new), frozenset())
    call = Call("transfer", devices, inputs, (), new, 0, 0) if new else None
    return call, tuple(outputs)
