"""What the step loops of all methods share: one iteration while it is issued, and an algorithm from its parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fr_jax._arrays import put
from fr_jax._placement import data_parallel_size, replicated, without_context_mesh
from fr_jax.algorithms._clipping import squares_of_others, with_others
from fr_jax.algorithms._functions import make_infer
from fr_jax.algorithms._losses import NOTHING, Told
from fr_jax.algorithms._stages import check_shapes
from fr_jax.algorithms._validation import (
    Setup,
    check_batch,
    check_inputs,
    check_params,
    check_state,
    iteration,
    naming_deleted,
    naming_inputs,
)
from fr_jax.distributed._alike import comparison
from fr_jax.types import Algorithm, Array, Batch, Info, InitAlgorithm, Predict, PyTree, Step

LAST = slice(-1, None)


class Iteration:
    """Iteration t of a method while it is issued: the state's tuples as lists, and what the step will report.

    ``shared`` are the method's :class:`Shared` functions; methods without micro-batches need none. Each method of this
    class calls one jitted function of a stage k = 0..K-1 and puts what comes back in its place. It keeps no reference
    to what has been used, so that a buffer is free after its last reader.

    Attributes:
      t: mini-batches seen before this one.
      params, model_state, opt_state, streams: lists with one entry per stage, for the method to replace.
      sums: for each stage the gradients for its next update, added up over micro-batches; None if it has none.
      loss: of this mini-batch, once the last stage has run.
      told: what the updates need of this mini-batch beside gradients, on the last stage's devices.
      grads: what each stage updated with, if the method returns gradients.
      measured: what is reported of each stage's update, by name; None for a stage that has not updated.
      metrics: what else the step reports.
    """

    def __init__(self, setup: Setup, state: Any, batch: Batch, shared: Any = None, *, any_size: bool) -> None:
        check_batch(setup, state.batch_spec, batch, any_size=any_size)
        K = len(setup.stages)
        check_params(state.params, K)
        self.t = iteration(state.step)
        self.params, self.model_state = list(state.params), list(state.model_state)
        self.opt_state, self.streams = list(state.opt_state), list(state.streams)
        self.sums: list[PyTree | None] = list(getattr(state, "sums", (None,) * K))
        self.loss: Any = None
        self.told = Told()
        self.grads: list[PyTree | None] = [None] * K
        self.measured: list[dict[str, Array] | None] = [None] * K
        self.metrics: dict[str, Array] = {}
        self.setup, self._shared, self._scored = setup, shared, []
        self._waiting: list[tuple[int, Told]] = []
        self._before = state.model_state if setup.skip_nonfinite else None

    def microbatches(self, batch: Batch) -> Iterator[tuple[int, PyTree, PyTree]]:
        """``(i, inputs, targets)`` for each micro-batch i = t M .. t M + M - 1, on the first and the last stage."""
        M, shared = self.setup.microbatches, self._shared
        if M == 1:
            yield self.t, self.send(batch.inputs, 0), batch.targets
            return
        inputs = list(shared.split_inputs(self.send(batch.inputs, 0)))
        targets = list(shared.split_targets(self.send(batch.targets, -1)))
        for i in range(self.t * M, self.t * M + M):
            yield i, inputs.pop(0), targets.pop(0)

    def send(self, x: PyTree, k: int) -> PyTree:
        """``x`` on the devices of stage k, without waiting."""
        return put(x, self.setup.shardings[k])

    def told_for(self, k: int) -> Told:
        """What stage k needs to know of this mini-batch for its update, on its devices."""
        told = Told(self.told.loss if self.setup.takes_loss[k] else (), self.told.weight)
        return put(told, replicated(self.setup.shardings[k])) if jax.tree.leaves(told) else told

    def play(self, k: int, play: Callable, h: PyTree, params: PyTree | None = None) -> PyTree:
        """Stage k's forward pass, at its weights or at ``params``; h_k on the devices of stage k+1."""
        params = self.params[k] if params is None else params
        h, moved, count = play(params, self.model_state[k], self.streams[k], h)
        self.model_state[k] = self.model_state[k] if moved is None else moved
        self.streams[k] = self.streams[k]._replace(count=count)
        return self.send(h, k + 1)

    def forward(self, k: int, forward: Callable, h: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        """Stage k's forward pass, at its weights or at ``params``: h_k where it was made, and the VJP."""
        params = self.params[k] if params is None else params
        h, vjp, self.model_state[k], count = forward(params, self.model_state[k], self.streams[k], h)
        self.streams[k] = self.streams[k]._replace(count=count)
        return h, vjp

    def train(
        self, train: Callable, h: PyTree, targets: PyTree, stages: slice = LAST, params: Sequence[PyTree] | None = None
    ) -> PyTree | None:
        """Forward and backward pass of ``stages``, their update if it is ``at_once``; delta for the stage below."""
        here = range(len(self.params))[stages]
        if self.setup.at_once:
            fields = self.params, self.model_state, self.opt_state, self.streams
            top = train(*(tuple(field[stages]) for field in fields), h, self.send(targets, here[-1]))
            self.params[stages], self.model_state[stages], self.opt_state[stages] = top[:3]
            self.loss, self.measured[stages], self.told = top.loss, top.measured, Told(top.loss)
            self.metrics |= top.metrics
            if top.grads is not None:
                self.grads[stages] = top.grads
        else:
            at = self.params[stages] if params is None else params
            fields = at, self.model_state[stages], self.streams[stages]
            top = train(*map(tuple, fields), h, targets, tuple(map(self._take_sums, here)))
            self.sums[stages], self.model_state[stages] = top.sums, top.model_state
            self._scored.append(top.scored)
        self.streams[stages] = [s._replace(count=c) for s, c in zip(self.streams[stages], top.counts, strict=True)]
        return top.delta

    def conclude(self, stages: slice = LAST) -> Told:
        """After each micro-batch: with the last, the loss of the mini-batch and the update of ``stages``.

        Returns what the updates of the stages below need, once the mini-batch is complete.
        """
        if len(self._scored) == self.setup.microbatches:
            self.loss, weight, metrics = self._shared.combine(*self._scored)
            self.told, self._scored = Told(self.loss, weight), []
            self.metrics |= metrics
            for k in range(len(self.params))[stages]:
                self.update(k, self.told)
        return self.told

    def replay(
        self, k: int, replay: Callable, h: PyTree, delta: PyTree, told: Told, weights: PyTree | None = None
    ) -> PyTree | None:
        """Stage k's replay of ``h`` at its own or other weights, gradient and, for M = 1, update; delta for below."""
        if self.setup.microbatches == 1:
            self.params[k], moved, self.opt_state[k], delta, self.grads[k], self.measured[k] = replay(
                self.params[k], self.model_state[k], self.opt_state[k], self.streams[k], h, delta, told, weights
            )
        else:
            weights = self.params[k] if weights is None else weights
            self.sums[k], moved, delta = replay(
                weights, self.model_state[k], self.streams[k], h, delta, self._take_sums(k)
            )
        self.model_state[k] = self.model_state[k] if moved is None else moved
        return delta

    def pull(self, k: int, pull: Callable, vjp: PyTree, delta: PyTree, weights: PyTree = ()) -> PyTree | None:
        """Stage k's backward pass by a VJP; delta for the stage below."""
        self.sums[k], delta = pull(vjp, delta, weights, self._take_sums(k))
        return delta

    def update(self, k: int, told: Told = NOTHING) -> None:
        """Stage k's optimizer step with the gradients that it has; nothing if a replay has made it (M = 1)."""
        if self.sums[k] is not None and self.setup.waits:
            self._waiting.append((k, told))
        elif self.sums[k] is not None:
            self._optimize(k, told)

    def _optimize(self, k: int, told: Told) -> None:
        grads, self.sums[k] = self.sums[k], None
        # The statistics go back with a dropped update, unless a late stage has moved them for newer mini-batches too.
        moved_here = self.setup.gradients != "late" or k == len(self.params) - 1
        statistics = (self.model_state[k], self._before[k]) if self._before is not None and moved_here else None
        new = self._shared.updates[k](self.params[k], self.opt_state[k], grads, told, statistics)
        self.params[k], self.opt_state[k], self.measured[k] = new.params, new.opt_state, new.measured
        if statistics is not None:
            self.model_state[k] = new.model_state
        if self.setup.return_grads:
            self.grads[k] = grads if new.grads is None else new.grads

    def _take_sums(self, k: int) -> PyTree | None:
        """Stage k's sums, zeros if its last update has used them up; None for M = 1, where nothing is added."""
        sums, self.sums[k] = self.sums[k], None
        return self._shared.zeros[k](self.params[k]) if sums is None and self.setup.microbatches > 1 else sums

    def _clip(self) -> None:
        """Norms to all stages: for updates that wait for them, or for those of the next step."""
        norms = [None if one is None else one["gradient_norm"] for one in self.measured]
        for k, told in self._waiting:
            norms[k] = self._shared.norms[k](self.sums[k], told)
        for k, others in enumerate(squares_of_others(norms, self.setup.shardings, late=not self.setup.waits)):
            self.opt_state[k] = with_others(self.opt_state[k], others)
        for k, told in self._waiting:
            self._optimize(k, told)

    def finish(self, state: Any, **in_flight: Sequence[Any]) -> tuple[Any, Info]:
        """The next state, with the method's own fields ``in_flight``, and what the step reports."""
        if self.setup.global_clip is not None and len(self.params) > 1:
            self._clip()
        fields = {
            "params": self.params,
            "model_state": self.model_state,
            "opt_state": self.opt_state,
            "streams": self.streams,
            **in_flight,
        }
        state = state._replace(step=self.t + 1, **{name: tuple(field) for name, field in fields.items()})
        of_stages = {
            f"{name}/{k}": value
            for k, measured in enumerate(self.measured, start=1)
            for name, value in (measured or {}).items()
        }
        grads = tuple(self.grads) if self.setup.return_grads else None
        return state, Info(self.loss, grads, self.metrics | of_stages)


def make_algorithm(setup: Setup, init: Callable, step: Callable, make_parts: Callable[[], Any]) -> Algorithm:
    """The algorithm of a method; its jitted functions are made, and a device is asked for, at the first call.

    Args:
      setup: the checked arguments.
      init: ``(setup, parts, key, batch, params, model_state) -> State``.
      step: ``(setup, parts, state, batch) -> (State, Info)``.
      make_parts: makes the method's jitted functions.
    """
    # Not at once: the functions name devices in their shardings, and a factory touches none.
    parts = functools.cache(make_parts)
    kinds: list[type] = []
    alike = functools.cache(lambda: comparison(setup.shardings))

    @_documented(InitAlgorithm)
    def init_(key: Array, batch: Batch, params: tuple | None = None, model_state: tuple | None = None) -> Any:
        with naming_deleted("init()", params=params, model_state=model_state), without_context_mesh():
            state = init(setup, parts(), key, batch, params, model_state)
        kinds[:] = [type(state)]
        if compare := alike():
            compare.init(key, batch)
        return state

    @_documented(Step)
    def step_(state: Any, batch: Batch, /) -> tuple[Any, Info]:
        check_state(state, kinds)
        try:
            with naming_deleted("step()", state=state, batch=batch), without_context_mesh():
                stepped = step(setup, parts(), state, batch)
        except Exception as error:
            check_shapes("step()", setup, state, error)
            raise
        if compare := alike():
            compare.step(batch)
        return stepped

    return Algorithm(init_, step_, make_predict(setup))


def _documented(protocol: type) -> Callable[[Callable], Callable]:
    """Gives a function the documentation of its protocol, for ``help(algorithm.step)``."""

    def document(function: Callable) -> Callable:
        function.__doc__, function.__name__ = protocol.__doc__, function.__name__.rstrip("_")
        return function

    return document


def make_predict(setup: Setup) -> Predict:
    """``(state, inputs) -> outputs``: the network in inference mode, each stage on its devices."""
    stages = functools.cache(lambda: tuple(map(make_infer, setup.stages)))

    @_documented(Predict)
    def predict(state: Any, inputs: PyTree, /) -> PyTree:
        check_inputs(inputs)
        check_state(state, called="predict()")
        check_params(state.params, len(setup.stages), "predict()")
        D = math.lcm(*map(data_parallel_size, setup.shardings))
        size = jax.tree.leaves(inputs)[0].shape[0]
        try:
            with naming_deleted("predict()", state=state, inputs=inputs), without_context_mesh():
                h = _padded(inputs, -size % D)
                for k, infer in enumerate(stages()):
                    with naming_inputs(state, inputs):
                        h = infer(state.params[k], state.model_state[k], put(h, setup.shardings[k]))
                return first_rows(size)(h) if size % D else h
        except Exception as error:
            check_shapes("predict()", setup, state, error)
            raise

    @functools.lru_cache(maxsize=128)
    def first_rows(size: int) -> Callable:
        rows = lambda h: jax.tree.map(lambda leaf: leaf[:size], h)
        return jax.jit(rows, out_shardings=replicated(setup.shardings[-1]))

    return predict


def _padded(x: PyTree, rows: int) -> PyTree:
    """With the last row repeated, so that each device of a stage has as many."""
    if not rows:
        return x
    return jax.tree.map(lambda leaf: leaf[np.minimum(np.arange(leaf.shape[0] + rows), leaf.shape[0] - 1)], x)
