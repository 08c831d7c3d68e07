"""A method's own step with each of its jitted functions watched, and their calls recorded."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import Sharding

from fr_jax.algorithms import backprop, ddg, dni, features_replay, gpipe, pipedream_2bw
from fr_jax.algorithms._delayed import Remedies
from fr_jax.algorithms._validation import Setup
from fr_jax.diagnostics.profiling import lockstep
from fr_jax.types import Batch

__all__ = ["STEPS", "Call", "Watched", "is_mine", "microbatches_of", "recorded_calls", "watched_step"]

_REPLAY, _NONE = features_replay.Options(), Remedies()
# (the method's jitted functions, its `init`, its `step`), the two without their first arguments, from its setup.
STEPS: dict[str, Callable[[Setup, Any], tuple[Any, Callable, Callable]]] = {
    "bp": lambda setup, own: (backprop.make_parts(setup), backprop.init, backprop.step),
    "fr": lambda setup, own: (
        features_replay.make_parts(_REPLAY, setup),
        functools.partial(features_replay.init, _REPLAY),
        functools.partial(features_replay.step, _REPLAY),
    ),
    "fr-lockstep": lambda setup, own: (lockstep.make_parts(setup), lockstep.init, lockstep.step),
    "ddg": lambda setup, own: (
        ddg.make_parts(_NONE, setup),
        functools.partial(ddg.init, _NONE),
        functools.partial(ddg.step, _NONE),
    ),
    "dni": lambda setup, own: (
        dni.make_parts(setup, own),
        functools.partial(dni.init, own),
        functools.partial(dni.step, own),
    ),
    # 1F1B makes the same calls.
    "gpipe": lambda setup, own: (gpipe.make_parts(setup), gpipe.init, functools.partial(gpipe.step, "gpipe")),
    "2bw": lambda setup, own: (pipedream_2bw.make_parts(setup), pipedream_2bw.init, pipedream_2bw.step),
}
_WORK = ("play", "replay", "forward", "backward", "update", "synthesize", "learn")
_KINDS = {name: kind for kind in _WORK for name in (kind, f"{kind}s")} | {"pulls": "backward", "errors": "learn"}
"""Field of a method's ``Parts`` -> field of ``StageTimes``; for ``last`` it depends on the method."""


class Watched(NamedTuple):
    """A jitted function of stage k: which kind of ``StageTimes`` its seconds belong to, and its field in the parts."""

    k: int
    kind: str
    field: str


Watch: TypeAlias = Callable[[Callable, Watched], Callable]


class Call(NamedTuple):
    """A function and its arguments."""

    run: Callable
    arguments: tuple

    @classmethod
    def of(cls, run: Callable, arguments: tuple) -> Call:
        """With copies of the arguments: ``run`` may donate their buffers, and they are needed again."""
        return cls(run, jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, arguments))

    def seconds(self) -> float:
        """From the call to the result."""
        _, copies = Call.of(*self)
        jax.block_until_ready(copies)
        start = time.perf_counter()
        jax.block_until_ready(self.run(*copies))
        return time.perf_counter() - start


def microbatches_of(method: str, given: int | None) -> int:
    """M: as given, where the method has micro-batches; by default 4 of GPipe and 8 of 2BW."""
    if method in ("dni", "fr-lockstep"):
        return 1
    return {"gpipe": 4, "2bw": 8}.get(method, 1) if given is None else given


def is_mine(sharding: Sharding | None) -> bool:
    """Whether all devices of a stage belong to this process."""
    return sharding is None or sharding.is_fully_addressable


def watched_step(
    method: str, setup: Setup, batch: Batch, watch: Watch, *, microbatches: int | None = None, synthesizers: Any = None
) -> tuple[Callable, Any]:
    """``(step, state)`` of a method, where ``watch`` replaces each function of this process's stages."""
    setup = dataclasses.replace(setup, microbatches=microbatches_of(method, microbatches))
    parts, init, step = STEPS[method](setup, synthesizers)
    state = init(setup, parts, jax.random.key(0), batch, None, None)
    kinds = _KINDS | {"last": "gradient" if setup.microbatches > 1 else "last"}
    mine, top = [is_mine(sharding) for sharding in setup.shardings], len(setup.stages) - 1

    def watched(run: Callable, k: int, field: str) -> Callable:
        return watch(run, Watched(k, kinds[field], field)) if mine[k] else run

    def spied(parts: Any) -> Any:
        fields: dict[str, Any] = {}
        for field, found in parts._asdict().items():
            if field == "shared":
                fields[field] = spied(found)
            elif field in kinds and callable(found):
                fields[field] = watched(found, top, field)
            elif field in kinds:
                fields[field] = tuple(watched(run, k, field) for k, run in enumerate(found))
        return parts._replace(**fields)

    return functools.partial(step, setup, spied(parts)), state


def recorded_calls(methods: Iterable[str], setup: Setup, batch: Batch, **own: Any) -> dict[Watched, list[Call]]:
    """What the methods call in step K, the first in which all stages update; of equal kinds those of the first method.

    ``own`` are the ``microbatches`` and ``synthesizers`` of :func:`watched_step`.
    """
    calls: dict[Watched, list[Call]] = {}
    for method in methods:
        found: dict[Watched, list[Call]] = defaultdict(list)

        # `found` is bound as a default: the closure of a loop would see the dict of the last method.
        def record(run: Callable, watched: Watched, found: dict[Watched, list[Call]] = found) -> Callable:
            def recorded(*arguments: Any) -> Any:
                found[watched].append(Call.of(run, arguments))
                return run(*arguments)

            return recorded

        step, state = watched_step(method, setup, batch, record, **own)
        for _ in setup.stages:
            found.clear()  # only step K counts: before it, some stages have nothing to replay
            state, _ = step(state, batch)
        known = {(watched.k, watched.kind) for watched in calls}
        calls |= {watched: own_calls for watched, own_calls in found.items() if watched[:2] not in known}
    return calls
