"""The cards of the methods that train dense networks only, which they make themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import fr_jax as fr
from fr_jax.experiments._cards import Method, TrainingSet, Values
from fr_jax.experiments._fields import own_setting
from fr_jax.types import Algorithm, Stage

__all__ = ["DENSE_CARDS"]

BETA = own_setting("beta", float, "Strength of the nudge (eqprop), or weight of z - W a (admm).", above=0)


def _layer_sizes(stages: Sequence[Stage], data: TrainingSet) -> tuple[int, ...]:
    """Those of an mlp, for methods that make their network themselves."""
    assert data.values is not None
    inputs = jax.ShapeDtypeStruct((1, data.values), jnp.float32)
    params, _ = jax.eval_shape(stages[0].init, jax.random.key(0), inputs)
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    return (data.values, *(units for _, units in kernels))


def _eqprop(
    own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: TrainingSet, **common: Any
) -> Algorithm:
    left = dict(own)
    options = {"centred": not left.pop("one_sided"), "step_size": left.pop("relaxation_step")}
    return fr.equilibrium_propagation(_layer_sizes(stages, data), optimizer, **left, **options, **common)


def _admm(
    own: Values, stages: Sequence[Stage], loss_fn: Any, optimizer: Any, data: TrainingSet, **common: Any
) -> Algorithm:
    options = {name: common[name] for name in ("placement", "donate", "metrics_fn") if name in common}
    return fr.admm(_layer_sizes(stages, data), **own, **options)


DENSE_CARDS: dict[str, Method] = {
    "eqprop": Method(
        short="EqProp",
        title="equilibrium propagation",
        make=_eqprop,
        learning_rate=0.025,
        own={
            BETA: 0.5,
            own_setting("one_sided", bool, "Nudge one way only, as in the first paper."): False,
            own_setting("free_steps", int, "Steps of the free phase.", least=1): 50,
            own_setting("nudged_steps", int, "Steps of each nudged phase.", least=1): 20,
            own_setting("relaxation_step", float, "Their length epsilon.", above=0, most=1): 0.5,
            own_setting("input_scale", float, "Factor of the (normalised) inputs.", above=0): 0.3,
        },
        models=("mlp",),
        whole=True,
        alone_bp=False,
        without={"dtype": "it computes in float32", "dropout_rate": "its units have no dropout"},
        note="Equilibrium propagation trains another network of the mlp's sizes, with units between 0 and 1, by their "
        "squared error: of its losses and the others' only the accuracies compare.",
    ),
    "admm": Method(
        short="ADMM",
        title="ADMM",
        make=_admm,
        learning_rate=0.0,
        own={
            BETA: 1.0,
            own_setting("gamma", float, "Weight of a - h(z).", above=0): 10.0,
            own_setting("warm_start", int, "Iterations before the first update of the multiplier.", least=0): 10,
        },
        models=("mlp",),
        whole=True,
        full_batch=True,
        alone_bp=False,
        without={
            **dict.fromkeys(
                ("optimizer", "learning_rate", "stage_learning_rates", "schedule", "warmup", "milestones", "momentum")
                + ("nesterov", "weight_decay", "clip"),
                "it solves for its weights and takes no gradient steps",
            ),
            "init_from": "it solves for its weights, whatever they were",
            "dtype": "it computes in float32",
            "dropout_rate": "its units have no dropout",
        },
        note="ADMM sees all examples in every step, and its training loss is its hinge loss: of its losses and the "
        "others' only the accuracies compare.",
    ),
}
