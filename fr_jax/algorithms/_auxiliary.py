"""Losses of a stage's own, such as the balance of a router: they travel beside the features, to the last stage.

The objective of a network is then its loss plus the auxiliary losses of all stages. What the last stage sends back for
them reaches every stage with its delta, so that each replay or VJP has the gradient of the stage's own in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fr_jax.types import Array, PyTree, Stage, WithLoss

__all__ = ["AUXILIARY", "Carried", "carried", "carrying", "check_loss", "taken_apart"]

AUXILIARY = "auxiliary_loss"
"""The name of their sum in ``Info.metrics``."""


class Carried(NamedTuple):
    """The features of a stage, and the auxiliary losses up to it.

    Attributes:
      features: leaves ``(B, ...)``.
      losses: ``(B,)``, the sum of the auxiliary losses so far, once for each example: their mean is that sum. So they
        are split and placed as the features are.
    """

    features: PyTree
    losses: Array


def taken_apart(h: PyTree) -> tuple[PyTree, Array | None]:
    """Features, and the auxiliary losses that they carry, or None."""
    return (h.features, h.losses) if isinstance(h, Carried) else (h, None)


def carried(features: PyTree, loss: Array | None = None) -> Carried:
    """Features with a first auxiliary loss beside them (0 for None); for arrays, or under ``jax.eval_shape``."""
    B = jax.tree.leaves(features)[0].shape[0]
    return Carried(features, jnp.full((B,), 0.0 if loss is None else loss, jnp.result_type(float)))


def carrying(stage: Stage) -> Stage:
    """The stage with its own loss, if it has one (:class:`fr_jax.WithLoss`), added to what its input carries."""

    def apply(
        params: PyTree, state: PyTree, x: PyTree, /, *, key: Array | None = None, train: bool = True
    ) -> tuple[PyTree, PyTree]:
        h, losses = taken_apart(x)
        h, new_state = stage.apply(params, state, h, key=key, train=train)
        if isinstance(new_state, WithLoss):
            new_state, loss = new_state
            if train:
                check_loss(loss)
                own = carried(h, loss)
                return own if losses is None else Carried(h, losses + own.losses), new_state
        return h if losses is None else Carried(h, losses), new_state

    return stage._replace(apply=apply)


def check_loss(loss: Any) -> None:
    """Raises ValueError unless a layer's own loss is one floating-point number."""
    if jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"this layer returns {jnp.result_type(loss)} of shape {jnp.shape(loss)} as its own loss; it must be one "
            "floating-point number, the mean over the mini-batch."
        )
