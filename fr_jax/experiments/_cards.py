"""What stands on the card of a method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fr_jax.diagnostics.simulation.schedules import MethodSchedule
from fr_jax.experiments._fields import Own
from fr_jax.partitioning.costs import StageWork
from fr_jax.types import Algorithm, Stage

__all__ = ["Compared", "Method", "TrainingSet", "Values"]

Values = Mapping[str, Any]
"""A method's own settings by name, every one with a value."""


class TrainingSet(NamedTuple):
    """What a method may need to know of the training data: how many examples and classes there are, if any.

    ``values``: those of an example, for methods that make their network themselves.
    """

    examples: int | None
    classes: int | None
    values: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """What can stand in a table of speeds.

    Attributes:
      short, title: its name in a table, and in a legend.
      bound: ``(K, own) -> speedup`` over back-propagation on one device, K > 1 balanced stages on a device each, if
        transfers take no time; None where no closed form is known.
      schedule: what its step loop issues; None if that is not known.
      work: ``(k, K, own) -> StageWork``, what stage k = 0..K-1 does in one step.
      decoupled: whether stages work on different mini-batches at the same time.
      alone_bp: whether it is back-propagation if K = 1.
      variants: by name, title and own settings of those that measuring programs show beside the default.
    """

    short: str
    title: str
    bound: Callable[[int, Values], float] | None = None
    schedule: MethodSchedule | None = None
    work: Callable[[int, int, Values], StageWork] = lambda k, K, own: StageWork()
    decoupled: bool = False
    alone_bp: bool = True
    variants: Mapping[str, tuple[str, Values]] = dataclasses.field(default_factory=dict)

    def speedup(self, K: int, own: Values) -> float | None:
        """The bound; with K = 1 nearly every method is back-propagation."""
        return 1.0 if K == 1 and self.alone_bp else None if self.bound is None else self.bound(K, own)

    def last_stage_weight(self, K: int, own: Values) -> float:
        """The last stage's work for a layer over that of the first, for :func:`fr_jax.balance`; backward counts 2."""
        first, last = (work.plays + 3 * work.passes for work in (self.work(0, K, own), self.work(K - 1, K, own)))
        return last / first

    def titled(self, own: Values, where: str = "") -> str:
        """The title, ``where`` it runs, and the number of micro-batches if there is more than one."""
        M = own.get("microbatches", 1)
        title = next((title for title, values in self.variants.values() if values.items() <= own.items()), self.title)
        return f"{title}{where}" + (f", M = {M}" if M > 1 else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Compared):
    """A method that the programs train with.

    Attributes:
      make: ``(own, stages, loss_fn, optimizer, data, **common) -> Algorithm``.
      learning_rate: default step size for a residual network if K > 1.
      own: its own settings, and their defaults.
      memory: its closed form in ``fr_jax.diagnostics.memory.activations``; empty if it has none.
      at_cut: ``own -> Stage``, a network of its own at each cut.
      late: whether the gradients of stage k are (K-k)/M updates late (:func:`fr_jax.staleness.mean_delay`).
      check: ``(own, K)``, raises SettingsError for own settings that do not go together, or not with K stages.
      models: those that it can train; empty for all.
      whole: whether it trains the network in one piece, with K = 1, and has no gradient of back-propagation's kind.
      full_batch: whether every step sees all training examples.
      without: settings of a run that mean nothing to it, and why.
      note: what a reader of its training loss must know.
    """

    make: Callable[..., Algorithm]
    learning_rate: float
    own: Mapping[Own, Any] = dataclasses.field(default_factory=dict)
    memory: str = ""
    at_cut: Callable[[Values], Stage] | None = None
    late: bool = False
    check: Callable[[Values, int], None] = lambda own, K: None
    models: tuple[str, ...] = ()
    whole: bool = False
    full_batch: bool = False
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own settings by name, and their defaults."""
        return {one.name: default for one, default in self.own.items()}
