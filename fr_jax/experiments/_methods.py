"""A card per method: all that programs, pictures, tables and tests need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optax

import fr_jax as fr
from fr_jax.diagnostics.simulation import schedules
from fr_jax.experiments._cards import Compared, Method, TrainingSet, Values
from fr_jax.experiments._dense_cards import DENSE_CARDS
from fr_jax.experiments._fields import SettingsError, own_setting
from fr_jax.experiments._remedies import ACCUMULATE, DISCREPANCY_DECAY, REMEDIES, check_prediction, remedied
from fr_jax.partitioning.costs import StageWork
from fr_jax.partitioning.cut import WORK
from fr_jax.types import Algorithm, Stage

__all__ = [
    "COMPARED",
    "DATA_PARALLEL",
    "LOCKSTEP",
    "METHODS",
    "VARIANTS",
    "Compared",
    "Method",
    "TrainingSet",
    "listed",
]

BATCH_STATS = own_setting(
    "batch_stats",
    str,
    "When batch-norm running statistics move: play, replay, or both (as the authors' code).",
    choices=("play", "replay", "both"),
)
REPLAY_WEIGHTS = own_setting(
    "replay_weights",
    str,
    "Weights of the replay: current, or stashed (those of the play, which gives DDG's gradients).",
    choices=("current", "stashed"),
)
MICROBATCHES = own_setting(
    "microbatches",
    int,
    "Equal parts M of a mini-batch that go through the pipeline one after another; one update for all.",
    least=1,
)
PIPELINE_SCHEDULE = own_setting(
    "pipeline_schedule",
    str,
    "gpipe (all forward passes first) or 1f1b: the same numbers in the same time, less memory.",
    choices=("gpipe", "1f1b"),
)


PENALTY = own_setting(
    "penalty",
    float,
    "Weight of the gluing losses, lambda (blockprop), or of the coordinates' errors, mu (mac).",
    least=0,
)
CACHE = own_setting(
    "cache", bool, "Keep the gluing variables (blockprop, its Algorithm 2) or coordinates (mac) of all examples."
)


def _bp(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    own, optimizer = remedied(own, optimizer, len(stages))
    return fr.backprop(stages, loss_fn, optimizer, **own, **common)


def _fr(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    own, optimizer = remedied(own, optimizer, len(stages))
    return fr.features_replay(stages, loss_fn, optimizer, **own, **common)


def _ddg(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    own, optimizer = remedied(own, optimizer, len(stages))
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


def _cached(make: Callable[..., Algorithm]) -> Callable[..., Algorithm]:
    """A method whose ``cache_size`` is the number of examples with ``--cache``."""

    def cached(
        own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: TrainingSet, **common: Any
    ) -> Algorithm:
        left = dict(own)
        if own["cache"] and data.examples is None:
            raise SettingsError("--cache keeps something for every example; these data are drawn anew. Drop the flag.")
        cache_size = data.examples if left.pop("cache") else None
        return make(stages, loss_fn, optimizer, cache_size=cache_size, **left, **common)

    return cached


def _check_fr(own: Values, K: int) -> None:
    check_prediction(own, K)
    if own["discrepancy_decay"] < 1 and own["replay_weights"] == "stashed":
        raise SettingsError(
            f"--discrepancy-decay {own['discrepancy_decay']} and --replay-weights stashed were both given: stashed "
            "weights are those of the play, so there is nothing to correct. Use one of them."
        )


def _check_2bw(own: Values, K: int) -> None:
    if own["microbatches"] < K:
        raise SettingsError(
            f"--microbatches {own['microbatches']} are too few for the --K {K} stages of 2bw, which needs at least K. "
            f"Use --microbatches {K} or more, or fewer stages."
        )


def _check_blockprop(own: Values, K: int) -> None:
    if own["h_every"] > 1 and not own["cache"]:
        raise SettingsError(
            f"--h-every {own['h_every']} needs the gluing variables of earlier visits. Add --cache, or drop the flag."
        )


def _check_mac(own: Values, K: int) -> None:
    if own["z_steps"] < K - 1 and not own["cache"]:
        raise SettingsError(
            f"--z-steps {own['z_steps']} do not reach the first of the --K {K} stages of mac: each carries the error "
            f"one stage down. Use --z-steps {K - 1} or more, or --cache, with which they add up over the epochs."
        )


def _gpipe(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    left = dict(own)
    return fr.gpipe(stages, loss_fn, optimizer, schedule=left.pop("pipeline_schedule"), **left, **common)


def _2bw(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    return fr.pipedream_2bw(stages, loss_fn, optimizer, **own, **common)


def _dfa(own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any) -> Algorithm:
    return fr.direct_feedback_alignment(stages, loss_fn, optimizer, **own, **common)


def _proxprop(
    own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: Any, **common: Any
) -> Algorithm:
    return fr.proximal_backprop(stages, loss_fn, optimizer, **own, **common)


METHODS: dict[str, Method] = {
    "fr": Method(
        short="FR",
        title="features replay",
        make=_fr,
        learning_rate=0.05,
        own={
            MICROBATCHES: 1,
            REPLAY_WEIGHTS: "current",
            BATCH_STATS: "play",
            **REMEDIES,
            DISCREPANCY_DECAY: 1.0,
        },
        work=lambda k, K, own: WORK["fr"](k, K),
        bound=lambda K, own: (3 * K + 1) / 4,
        schedule=schedules.features_replay,
        memory="fr",
        decoupled=True,
        late=True,
        variants={"fr-stashed": ("features replay, stashed weights", {REPLAY_WEIGHTS.name: "stashed"})},
        check=_check_fr,
    ),
    "bp": Method(
        short="BP",
        title="back-propagation",
        make=_bp,
        learning_rate=0.1,
        own={MICROBATCHES: 1, ACCUMULATE: 1},
        bound=lambda K, own: 1.0,
        schedule=schedules.back_propagation,
        memory="bp",
    ),
    "ddg": Method(
        short="DDG",
        title="DDG",
        make=_ddg,
        learning_rate=0.05,
        own={MICROBATCHES: 1, **REMEDIES},
        bound=lambda K, own: float(K),
        schedule=schedules.ddg,
        memory="ddg",
        decoupled=True,
        late=True,
        check=check_prediction,
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
        make=_cached(lambda *args, **own: fr.blockprop(*args, **own)),
        learning_rate=0.05,
        own={
            PENALTY: 1.0,
            own_setting("h_steps", int, "Gradient steps N_h on each gluing variable.", least=0): 1,
            own_setting("h_learning_rate", float, "Their step size.", least=0): 0.01,
            CACHE: False,
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
        own={MICROBATCHES: 4, PIPELINE_SCHEDULE: "gpipe"},
        memory="gpipe",
        variants={"1f1b": ("1F1B", {PIPELINE_SCHEDULE.name: "1f1b"})},
        bound=lambda K, own: K * own["microbatches"] / (own["microbatches"] + K - 1),
        schedule=schedules.gpipe,
    ),
    "2bw": Method(
        short="2BW",
        title="PipeDream-2BW",
        make=_2bw,
        learning_rate=0.05,
        own={MICROBATCHES: 8},
        work=lambda k, K, own: WORK["2bw"](k, K),
        bound=lambda K, own: float(K),
        schedule=schedules.ddg,
        memory="ddg",
        decoupled=True,
        check=_check_2bw,
    ),
    "dfa": Method(
        short="DFA",
        title="direct feedback alignment",
        make=_dfa,
        learning_rate=0.05,
        # A step is the forward passes of all stages, one after the other, and the backward pass of one.
        bound=lambda K, own: 3 * K / (K + 2),
    ),
    "proxprop": Method(
        short="ProxProp",
        title="proximal back-propagation",
        make=_proxprop,
        learning_rate=0.05,
        own={
            own_setting("proximal_step", float, "Length tau of the implicit steps of the weights.", above=0): 1.0,
            own_setting("cg_steps", int, "Conjugate-gradient steps n that each of them takes.", least=1): 3,
        },
        # Each of the n steps is a forward pass and a gradient for the weights, two thirds of a pass.
        work=lambda k, K, own: StageWork(passes=1 + 2 * own["cg_steps"] / 3),
        alone_bp=False,
        bound=lambda K, own: 3 / (3 + 2 * own["cg_steps"]),
    ),
    "mac": Method(
        short="MAC",
        title="MAC",
        make=_cached(lambda *args, **own: fr.auxiliary_coordinates(*args, **own)),
        learning_rate=0.05,
        own={
            PENALTY: 1.0,
            own_setting("penalty_growth", float, "Factor by which the penalty grows; 1 keeps it.", least=1): 2.0,
            own_setting(
                "penalty_patience", int, "Mini-batches without progress, on average, after which it grows.", least=1
            ): 100,
            own_setting("w_steps", int, "Optimizer steps of every stage per mini-batch.", least=1): 1,
            own_setting("z_steps", int, "Gradient steps on the coordinates per mini-batch.", least=0): 5,
            own_setting("z_learning_rate", float, "Their step size, times the penalty.", above=0): 0.1,
            CACHE: False,
        },
        check=_check_mac,
        work=lambda k, K, own: StageWork(
            plays=float(k < K - 1), passes=float(own["w_steps"]), input_passes=float(own["z_steps"]) if k else 0.0
        ),
        note="MAC's training loss is taken at its coordinates, where it is lower than the network's own.",
    ),
    **DENSE_CARDS,
}

VARIANTS = {name: (method, own) for method, card in METHODS.items() for name, (_, own) in card.variants.items()}
"""Method and own settings of what measuring programs show beside the methods, by name."""
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
