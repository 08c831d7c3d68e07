"""What methods with late gradients share: what is in flight, old versions of the weights, and predicted ones.

With M micro-batches to a mini-batch, micro-batch i = t M + m enters the pipeline in sub-iteration i, and a stage of
staleness d = K-k uses the gradient of micro-batch s = i - d. It updates once it has those of a whole mini-batch, after
the sub-iterations with (s + 1) mod M = 0. With M = 1 sub-iterations are iterations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Sharding

from fr_jax._arrays import put
from fr_jax._placement import jit, replicated
from fr_jax.algorithms import _history as fifo
from fr_jax.algorithms._history import History
from fr_jax.algorithms._losses import NOTHING, Told, combine, score, wide
from fr_jax.algorithms._stages import Stages, zeros
from fr_jax.algorithms._step import Iteration
from fr_jax.algorithms._validation import Setup, check_between
from fr_jax.algorithms.staleness import corrected, predicted, remember_trend, remember_update
from fr_jax.types import PyTree


def nothing_sent(setup: Setup, stages: Stages) -> tuple[tuple[PyTree, ...], tuple[Told, ...]]:
    """The deltas of a state before the first step, and what is told with them: zeros for each stage k < K."""
    below = range(len(setup.stages) - 1)
    deltas = tuple(zeros(stages.features[k + 1], setup.shardings[k]) for k in below)
    # No leaves unless an update uses them, so that checkpoints from before this field existed still fit.
    if setup.microbatches == 1 and not any(setup.takes_loss[:-1]):
        return deltas, (NOTHING,) * len(below)

    def told(outputs: PyTree, targets: PyTree) -> Told:
        loss, weight, _ = combine([score(setup.loss_fn, None, outputs, targets)] * setup.microbatches)
        return Told(loss, weight if setup.microbatches > 1 else ())

    spec = jax.eval_shape(told, stages.outputs, stages.targets)
    return deltas, tuple(zeros(_needed(setup, spec, k), replicated(setup.shardings[k])) for k in below)


def nothing_added(setup: Setup, stages: Stages) -> tuple[PyTree, ...]:
    """The sums of a state before the first step: zeros for each stage that has a part of them between steps."""
    K, M = len(setup.stages), setup.microbatches
    like = lambda k: jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, wide(w.dtype)), stages.params[k])
    has_part = lambda k: (K - 1 - k) % M > 0
    return tuple(zeros(like(k), replicated(setup.shardings[k])) if has_part(k) else None for k in range(K))


def vjps_of_zeros(setup: Setup, stages: Stages, forwards: Sequence[Callable]) -> tuple[History, ...]:
    """The histories of VJPs of a state before the first step: those of an input of zeros, which are never applied."""
    history = []
    for k, forward in enumerate(forwards):
        h_in = zeros(stages.features[k], setup.shardings[k])
        with jax.debug_nans(False):  # a stage need not be defined there
            _, vjp, _, _ = forward(stages.params[k], stages.model_state[k], stages.streams[k], h_in)
        history.append(fifo.empty(len(forwards) - k, lambda vjp=vjp: vjp))
    return tuple(history)


def is_whole(s: int, M: int) -> bool:
    """Whether micro-batch s is the last of its mini-batch."""
    return (s + 1) % M == 0


def receive(
    now: Iteration, k: int, s: int, delta: PyTree | None, told: Told, deltas: list[PyTree], losses: list[Told]
) -> tuple[PyTree, Told]:
    """What stage k was sent for micro-batch s; what it is sent now, for micro-batch s + 1, takes its place."""
    arrived = deltas[k], losses[k]
    if delta is not None:
        deltas[k] = now.send(delta, k)
        if is_whole(s + 1, now.setup.microbatches):
            told = _needed(now.setup, told, k)
            losses[k] = put(told, replicated(now.setup.shardings[k])) if jax.tree.leaves(told) else told
    return arrived


def _needed(setup: Setup, told: Told, k: int) -> Told:
    return told if any(setup.takes_loss[: k + 1]) else told._replace(loss=())


class Versions(NamedTuple):
    """Which weights a stage of staleness d plays micro-batch i with, as a number that grows with i.

    A stage updates after sub-iteration i if (i + 1 - d) mod M = 0. Predicted weights change with the mini-batch, too:
    its micro-batches have one more update before them than the last ones of the mini-batch before.
    """

    staleness: int
    M: int
    predicted: bool

    def of(self, i: int) -> int:
        """The version of micro-batch i."""
        d, M = self.staleness, self.M
        return (i - d) // M + (i // M if self.predicted and d % M else 0)

    def nothing_stashed(self, weights: PyTree) -> History:
        """The stash of a state before the first step: entries that nothing was played with."""
        return fifo.empty(self.of(0) - self.of(-self.staleness), lambda: weights)

    def turn(self, stash: History, current: PyTree, i: int) -> tuple[PyTree, History]:
        """Sub-iteration i of a stage that plays with ``current``: weights of micro-batch i - d, and the next stash."""
        return self.replayed(stash, current, i), self.rotate(stash, current, i)

    def replayed(self, stash: History, current: PyTree, i: int) -> PyTree:
        """In sub-iteration i the weights of micro-batch i - d: the oldest in the stash, or those of micro-batch i."""
        return current if self.of(i - self.staleness) == self.of(i) else stash.entries[0]

    def rotate(self, stash: History, current: PyTree, i: int) -> History:
        """The stash after sub-iteration i: with the version that ends then, without one that no other needs.

        It has one entry for each version in flight that is not the newest: between steps ceil(2d/M) - ceil(d/M), at
        most ceil(d/M), without prediction.
        """
        if self.of(i + 1) != self.of(i):
            stash = fifo.push(stash, current)
        if self.of(i + 1 - self.staleness) != self.of(i - self.staleness):
            _, stash = fifo.pop(stash)
        return stash


def horizon(i: int, staleness: int, M: int) -> int:
    """How many updates a stage makes between its play of micro-batch i and the replay."""
    return (staleness - i % M + M - 1) // M if staleness > i % M else 0


class Remedies(NamedTuple):
    """The arguments of a method against staleness: :func:`predicted` and :func:`corrected` weights."""

    weight_prediction: float = 0.0
    prediction_momentum: float = 1.0
    discrepancy_decay: float = 1.0

    def versions(self, staleness: int, M: int) -> Versions:
        """The versions of the weights that a stage plays with."""
        return Versions(staleness, M, self.weight_prediction > 0)


def with_remedies(setup: Setup, remedies: Remedies) -> Setup:
    """Optimizers that remember what the remedies need, for all stages but the last; unchanged if they are off.

    Raises:
      ValueError: a remedy is out of its bounds, or both are on.
    """
    strength, b, D = remedies
    check_between(
        "weight_prediction", strength, 0, math.inf, "0 is off, 1 goes to the weights predicted for the replay"
    )
    check_between("prediction_momentum", b, 0, 1, "b of the optimizer, or 1 for a last update that does not fade")
    check_between("discrepancy_decay", D, 0, 1, "D of PipeMare; 1 is no correction")
    if strength and D < 1:
        raise ValueError(
            f"weight_prediction = {strength} and discrepancy_decay = {D} were given: the first takes the play to the "
            "weights of the replay, the second the replay back to those of the play. Use one of them."
        )
    *late, last = setup.optimizers
    if strength:
        return dataclasses.replace(setup, optimizers=(*map(remember_update, late), last))
    if D < 1:
        K, M = len(setup.stages), setup.microbatches
        return dataclasses.replace(setup, optimizers=remember_trend(setup.optimizers, D, K, M))
    return setup


def make_ahead(shardings: Sequence[Sharding], remedies: Remedies) -> tuple[Callable, ...]:
    """``(params, opt_state, horizon) -> w_hat`` for each stage k < K: its weights that many updates ahead."""
    strength, b, _ = remedies
    if strength == 0:
        return tuple(lambda params, opt_state, horizon: params for _ in shardings[:-1])
    predict = lambda params, opt_state, horizon: predicted(params, opt_state, horizon, strength, b)
    here = map(replicated, shardings[:-1])
    return tuple(jit(predict, static_argnums=2, out_shardings=sharding) for sharding in here)


def make_back(shardings: Sequence[Sharding], remedies: Remedies) -> tuple[Callable, ...]:
    """``(params, opt_state, horizon) -> weights``: about those of that many updates ago; None for ``params``."""
    if remedies.discrepancy_decay == 1:
        return tuple(lambda params, opt_state, horizon: None for _ in shardings[:-1])
    here = map(replicated, shardings[:-1])
    run = [jit(corrected, static_argnums=2, out_shardings=sharding) for sharding in here]
    return tuple(lambda params, opt_state, n, run=one: run(params, opt_state, n) if n else None for one in run)
