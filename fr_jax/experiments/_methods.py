"""A card per method: all that programs, pictures, tables and tests need to know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

import fr_jax as fr
from fr_jax.diagnostics.simulation import schedules
from fr_jax.diagnostics.simulation.schedules import MethodSchedule
from fr_jax.experiments._fields import Own, SettingsError, own_setting
from fr_jax.partitioning.costs import StageWork
from fr_jax.partitioning.cut import WORK
from fr_jax.types import Algorithm, Stage

__all__ = [
    "COMPARED",
    "DATA_PARALLEL",
    "LOCKSTEP",
    "METHODS",
    "Compared",
    "Method",
    "TrainingSet",
    "listed",
]

Values = Mapping[str, Any]
"""A method's own settings by name, every one with a value."""


class TrainingSet(NamedTuple):
    """What a method may need to know of the training data: how many examples and classes there are, if any."""

    examples: int | None
    classes: int | None


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
    """

    short: str
    title: str
    bound: Callable[[int, Values], float] | None = None
    schedule: MethodSchedule | None = None
    work: Callable[[int, int, Values], StageWork] = lambda k, K, own: StageWork()
    decoupled: bool = False

    def speedup(self, K: int, own: Values) -> float | None:
        """The bound; with K = 1 every method is back-propagation."""
        return 1.0 if K == 1 else None if self.bound is None else self.bound(K, own)

    def last_stage_weight(self, K: int, own: Values) -> float:
        """The last stage's work for a layer over that of the first, for :func:`fr_jax.balance`; backward counts 2."""
        first, last = (work.plays + 3 * work.passes for work in (self.work(0, K, own), self.work(K - 1, K, own)))
        return last / first

    def titled(self, own: Values, where: str = "") -> str:
        """The title, ``where`` it runs, and the number of micro-batches if there is more than one."""
        M = own.get("microbatches", 1)
        return f"{self.title}{where}" + (f", M = {M}" if M > 1 else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Compared):
    """A method that the programs train with.

    Attributes:
      make: ``(own, stages, loss_fn, optimizer, data, **common) -> Algorithm``.
      learning_rate: default step size for a residual network if K > 1.
      own: its own settings, and their defaults.
      memory: its closed form in ``fr_jax.diagnostics.memory.activations``; empty if it has none.
      at_cut: ``own -> Stage``, a network of its own at each cut.
      check: raises SettingsError for own settings that do not go together.
      note: what a reader of its training loss must know.
    """

    make: Callable[..., Algorithm]
    learning_rate: float
    own: Mapping[Own, Any] = dataclasses.field(default_factory=dict)
    memory: str = ""
    at_cut: Callable[[Values], Stage] | None = None
    check: Callable[[Values], None] = lambda own: None
    note: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own settings by name, and their defaults."""
        return {one.name: default for one, default in self.own.items()}


BATCH_STATS = own_setting(
    "batch_stats",
    str,
    "When batch-norm running statistics move: play, replay, or both (as the authors' code).",
    choices=("play", "replay", "both"),
)
GRADIENT_SHRINKING = own_setting(
    "gradient_shrinking", float, "FDG's factor b: stage k's gradient is shrunk by b^(K-k); 1 is off.", above=0, most=1
)
ACCUMULATE = own_setting("accumulate", int, "ADL's m: one update for the mean gradient of m mini-batches.", least=1)
WEIGHT_PREDICTION = own_setting(
    "weight_prediction",
    float,
    "SpecTrain: how far the forward pass goes towards the weights of the update, 0 to 1.",
    least=0,
)
MICROBATCHES = own_setting(
    "microbatches", int, "Equal parts M of a mini-batch that go through the pipeline one after another.", least=1
)
REMEDIES = {GRADIENT_SHRINKING: 1.0, ACCUMULATE: 1, WEIGHT_PREDICTION: 0.0}
"""Against staleness."""


def _remedied(own: Values, optimizer: Any, K: int) -> tuple[dict[str, Any], Sequence[optax.GradientTransformation]]:
    """The settings that are left, and the stages' optimizers (one for all, or K) wrapped as the others say."""
    left = dict(own)
    every = left.pop("accumulate")
    one_for_all = isinstance(optimizer, optax.GradientTransformation)
    each = tuple(fr.staleness.accumulate(one, every) for one in ((optimizer,) if one_for_all else optimizer))
    factor = left.pop("gradient_shrinking", 1.0)
    return left, fr.staleness.shrink_gradients(each[0] if one_for_all else each, factor, K)


def _bp(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    own, optimizer = _remedied(own, optimizer, len(stages))
    return fr.backprop(stages, loss_fn, optimizer, **own, **common)


def _fr(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    own, optimizer = _remedied(own, optimizer, len(stages))
    return fr.features_replay(stages, loss_fn, optimizer, **own, **common)


def _ddg(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    own, optimizer = _remedied(own, optimizer, len(stages))
    return fr.ddg(stages, loss_fn, optimizer, **own, **common)


def _dni(
    own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: TrainingSet, **common: Any
) -> Algorithm:
    conditioned = own["label_conditioning"]
    if conditioned and data.classes is None:
        raise SettingsError("--label-conditioning needs one label per example, which these data lack. Drop the flag.")
    synthesizer = fr.models.synthesizer(data.classes if conditioned else None, hidden=own["synthesizer_hidden"])
    learner = optax.adam(own["synthesizer_learning_rate"])
    return fr.dni(stages, loss_fn, optimizer, synthesizer, learner, label_conditioning=conditioned, **common)


def _blockprop(
    own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: TrainingSet, **common: Any
) -> Algorithm:
    left = dict(own)
    if own["cache"] and data.examples is None:
        raise SettingsError("--cache keeps something for every example; these data are drawn anew. Drop the flag.")
    cache_size = data.examples if left.pop("cache") else None
    return fr.blockprop(stages, loss_fn, optimizer, cache_size=cache_size, **left, **common)


def _check_blockprop(own: Values) -> None:
    if own["h_every"] > 1 and not own["cache"]:
        raise SettingsError(
            f"--h-every {own['h_every']} needs the gluing variables of earlier visits. Add --cache, or drop the flag."
        )


def _gpipe(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    return fr.gpipe(stages, loss_fn, optimizer, **own, **common)


METHODS: dict[str, Method] = {
    "fr": Method(
        short="FR",
        title="features replay",
        make=_fr,
        learning_rate=0.05,
        own={BATCH_STATS: "play", **REMEDIES},
        work=lambda k, K, own: WORK["fr"](k, K),
        bound=lambda K, own: (3 * K + 1) / 4,
        schedule=schedules.features_replay,
        memory="fr",
        decoupled=True,
    ),
    "bp": Method(
        short="BP",
        title="back-propagation",
        make=_bp,
        learning_rate=0.1,
        own={ACCUMULATE: 1},
        bound=lambda K, own: 1.0,
        schedule=schedules.back_propagation,
        memory="bp",
    ),
    "ddg": Method(
        short="DDG",
        title="DDG",
        make=_ddg,
        learning_rate=0.05,
        own=REMEDIES,
        bound=lambda K, own: float(K),
        schedule=schedules.ddg,
        memory="ddg",
        decoupled=True,
    ),
    "dni": Method(
        short="DNI",
        title="DNI",
        make=_dni,
        learning_rate=0.015,
        own={
            own_setting(
                "synthesizer_hidden",
                int,
                "Channels of the synthesizers' hidden layers. Default: as many as the feature has.",
                least=1,
            ): None,
            own_setting("synthesizer_learning_rate", float, "Step size of the synthesizers' Adam.", least=0): 1e-3,
            own_setting("label_conditioning", bool, "Show the labels to the synthesizers (cDNI)."): False,
        },
        # Synthesizer k learns from the gradient of stage k+1 in the same iteration (Jaderberg et al. 2017), which comes
        # 4/3 of a stage's step after that stage's input: K is not reached even by synthesizers that cost nothing.
        bound=lambda K, own: 3 * K / 4,
        schedule=schedules.dni,
        at_cut=lambda own: fr.models.synthesizer(hidden=own["synthesizer_hidden"]),
        decoupled=True,
    ),
    "blockprop": Method(
        short="BlockProp",
        title="BlockProp",
        make=_blockprop,
        learning_rate=0.05,
        own={
            own_setting("penalty", float, "Weight lambda of the gluing losses.", least=0): 1.0,
            own_setting("h_steps", int, "Gradient steps N_h on each gluing variable.", least=0): 1,
            own_setting("h_learning_rate", float, "Their step size.", least=0): 0.01,
            own_setting(
                "cache", bool, "Keep the gluing variables of all examples on their devices (Algorithm 2)."
            ): False,
            own_setting(
                "h_every", int, "With --cache: take the h-steps at every E-th visit of an example only.", least=1
            ): 1,
        },
        check=_check_blockprop,
        work=lambda k, K, own: WORK["blockprop"](k, K, own["h_steps"]),
        note="BlockProp's training loss is taken at its gluing variables, where it is lower than the network's own.",
    ),
    "gpipe": Method(
        short="GPipe",
        title="GPipe",
        make=_gpipe,
        learning_rate=0.1,
        own={MICROBATCHES: 4},
        bound=lambda K, own: K * own["microbatches"] / (own["microbatches"] + K - 1),
        schedule=schedules.gpipe,
    ),
}

DATA_PARALLEL, LOCKSTEP = "dp", "fr-lockstep"
REFERENCES: dict[str, Compared] = {
    LOCKSTEP: Compared(
        short="FR lock",
        title="features replay with barriers",
        bound=lambda K, own: 3 / (1 + 3 / K),
        schedule=schedules.features_replay_lockstep,
        decoupled=True,
    ),
    DATA_PARALLEL: Compared(short="data p.", title="data parallelism", bound=lambda K, own: float(K)),
}
"""What stands beside the methods in tables of speeds and is not one of them."""
COMPARED = {**{name: card for name, card in METHODS.items() if card.schedule is not None}, **REFERENCES}
"""What can be simulated."""


def listed() -> str:
    """The methods for a help text, such as ``fr (features replay), ddg or gpipe``."""
    *names, last = [name if name == card.title.lower() else f"{name} ({card.title})" for name, card in METHODS.items()]
    return f"{', '.join(names)} or {last}" if names else last
