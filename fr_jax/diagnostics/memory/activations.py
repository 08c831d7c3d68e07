"""Table 1 of the features replay paper with constants: activations by closed forms, in bytes.

With A_k the activations of stage k, f_k = |h_{k-1}| its input, and K stages:

    back-propagation                     sum_k A_k
    DDG                                  sum_k (K-k+1) A_k
    features replay                      sum_k A_k + sum_{k<K} (K-k+1) f_k
    features replay, one device          max_k A_k + sum_{k<K} (K-k+1) f_k
    checkpointed back-propagation        max_k A_k + sum_k f_k
    GPipe                                M sum_k A_k
    1F1B                                 sum_k min(M, K-k+1) A_k

With M micro-batches, A_k and f_k are those of one. The paper writes O(L), O(LK + K^2), O(L + K^2), O(L/K + K^2).
Gradients in flight between stages, and the mini-batch itself, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fr_jax.algorithms._functions import make_forward
from fr_jax.algorithms._stages import KeyStream
from fr_jax.types import PyTree, Stage

__all__ = ["FORMS", "StageActivations", "closed_form", "stage_activations"]


class StageActivations(NamedTuple):
    """Bytes of one stage for one mini-batch: f_k, its input; A_k, what its VJP stores, weights not counted."""

    inputs: float
    residuals: float


def _nbytes(tree: PyTree) -> int:
    return sum(int(np.prod(leaf.shape, dtype=int)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def stage_activations(stages: Sequence[Stage], inputs: jax.ShapeDtypeStruct) -> tuple[StageActivations, ...]:
    """Counts the activations of each of the K stages for a mini-batch ``(B, ...)``, in bytes, from shapes alone.

    JAX stores more than XLA needs if both passes are one function.

    Example:
      >>> import fr_jax as fr
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
      >>> [one.inputs for one in stage_activations(stages, jax.ShapeDtypeStruct((4, 784), "float32"))]
      [12544, 128]
    """
    found, h = [], inputs
    stream = jax.eval_shape(lambda: KeyStream(jax.random.key(0), jnp.zeros((), jnp.int32)))
    for k, stage in enumerate(stages):
        params, state = jax.eval_shape(stage.init, stream.key, h)
        # The VJP without the weights: every method keeps those anyway.
        forward = make_forward(stage, input_gradient=k > 0, keep_weights=False)
        h_out, vjp, _, _ = jax.eval_shape(forward, params, state, stream, h)
        found.append(StageActivations(_nbytes(h), _nbytes(vjp)))
        h = h_out
    return tuple(found)


def _history(stages: Sequence[StageActivations]) -> float:
    return sum((len(stages) - k) * stage.inputs for k, stage in enumerate(stages[:-1]))


_residuals = lambda stages: [stage.residuals for stage in stages]
_checkpointed = lambda stages: max(_residuals(stages)) + sum(stage.inputs for stage in stages)

_in_flight = lambda stages, most: sum(min(most, len(stages) - k) * one.residuals for k, one in enumerate(stages))

FORMS = {
    "bp": lambda stages, M: sum(_residuals(stages)),
    "ddg": lambda stages, M: _in_flight(stages, len(stages)),
    "fr": lambda stages, M: sum(_residuals(stages)) + _history(stages),
    "fr-one-device": lambda stages, M: max(_residuals(stages)) + _history(stages),
    "checkpoint": lambda stages, M: _checkpointed(stages),
    "recompute": lambda stages, M: _checkpointed(stages),
    "gpipe": lambda stages, M: M * sum(_residuals(stages)),
    "1f1b": lambda stages, M: _in_flight(stages, M),
}
"""The form of each method: of its stages for one micro-batch, and M."""


def closed_form(
    method: str, stages: Sequence[StageActivations], whole: float | None = None, microbatches: int = 1
) -> float | None:
    """Activations of a method in bytes, by its closed form; None if :data:`FORMS` has none for it.

    ``stages`` are those for a mini-batch, which is split into ``microbatches``. ``whole`` are the activations of the
    whole network in bytes, if they are known better than as the sum of the residuals: each stage then has its share.

    Example:
      >>> stages = [StageActivations(inputs=1, residuals=100)] * 4
      >>> [closed_form(method, stages) for method in ("bp", "fr", "ddg", "checkpoint")]
      [400.0, 409.0, 1000.0, 104.0]
      >>> [closed_form(method, stages, microbatches=2) for method in ("gpipe", "1f1b", "ddg")]
      [400.0, 350.0, 500.0]
    """
    if method not in FORMS:
        return None
    scale = 1.0 if whole is None else whole / sum(stage.residuals for stage in stages)
    M = microbatches
    return float(FORMS[method]([StageActivations(one.inputs / M, scale * one.residuals / M) for one in stages], M))
