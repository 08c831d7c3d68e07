"""Table 1 of the features replay paper with constants: activations by the closed forms, in bytes.

With A_k the activations of module k, f_k = |h_{k-1}| its input, and K modules:

    back-propagation                     sum_k A_k
    DDG                                  sum_k (K-k+1) A_k
    features replay                      sum_k A_k + sum_{k<K} (K-k+1) f_k
    features replay, one device          max_k A_k + sum_{k<K} (K-k+1) f_k
    checkpointed back-propagation        max_k A_k + sum_k f_k

The paper writes O(L), O(LK + K^2), O(L + K^2), O(L/K + K^2). Gradients on their way between modules are left out.
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

__all__ = ["FORMS", "ModuleActivations", "closed_form", "module_activations"]


class ModuleActivations(NamedTuple):
    """Bytes of one module for one mini-batch.

    Attributes:
      inputs: f_k, its input.
      residuals: A_k, what the vector-Jacobian product of its forward pass stores, weights not counted.
    """

    inputs: float
    residuals: float


def _nbytes(tree: PyTree) -> int:
    return sum(int(np.prod(leaf.shape, dtype=int)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def module_activations(stages: Sequence[Stage], inputs: jax.ShapeDtypeStruct) -> tuple[ModuleActivations, ...]:
    """Counts the activations of every module, from shapes alone.

    Args:
      stages: the K modules.
      inputs: ``(B, ...)``, a mini-batch.

    Returns:
      K entries, in bytes. JAX stores more than XLA needs where both passes are one function.

    Example:
      >>> import jax
      >>> import fr_jax as fr
      >>> from fr_jax.diagnostics.memory.activations import module_activations
      >>> stages = fr.partition(fr.models.mlp(depth=2, width=8), (1,))
      >>> [module.inputs for module in module_activations(stages, jax.ShapeDtypeStruct((4, 784), "float32"))]
      [12544, 128]
    """
    found, h = [], inputs
    stream = jax.eval_shape(lambda: KeyStream(jax.random.key(0), jnp.zeros((), jnp.int32)))
    for k, stage in enumerate(stages):
        params, state = jax.eval_shape(stage.init, stream.key, h)
        forward = make_forward(stage, input_gradient=k > 0, keep_weights=False)
        h_out, vjp, _, _ = jax.eval_shape(forward, params, state, stream, h)
        found.append(ModuleActivations(_nbytes(h), _nbytes(vjp)))
        h = h_out
    return tuple(found)


def _history(modules: Sequence[ModuleActivations]) -> float:
    K = len(modules)
    return sum((K - k) * module.inputs for k, module in enumerate(modules[:-1]))


def _checkpointed(modules: Sequence[ModuleActivations]) -> float:
    return max(module.residuals for module in modules) + sum(module.inputs for module in modules)


FORMS = {
    "bp": lambda modules: sum(module.residuals for module in modules),
    "ddg": lambda modules: sum((len(modules) - k) * module.residuals for k, module in enumerate(modules)),
    "fr": lambda modules: sum(module.residuals for module in modules) + _history(modules),
    "fr-one-device": lambda modules: max(module.residuals for module in modules) + _history(modules),
    "checkpoint": _checkpointed,
    "recompute": _checkpointed,
}


def closed_form(method: str, modules: Sequence[ModuleActivations], whole: float | None = None) -> float | None:
    """Activations of a method in bytes, by its closed form.

    Args:
      method: a key of :data:`FORMS`.
      modules: the K modules.
      whole: the activations of the whole network in bytes, if they are known better than as the sum of the residuals:
        each module then has its share of them.

    Returns:
      Bytes; None where the table has no form for the method.

    Example:
      >>> from fr_jax.diagnostics.memory.activations import ModuleActivations, closed_form
      >>> modules = [ModuleActivations(inputs=1, residuals=100)] * 4
      >>> [closed_form(method, modules) for method in ("bp", "fr", "ddg", "checkpoint")]
      [400.0, 409.0, 1000.0, 104.0]
    """
    if method not in FORMS:
        return None
    scale = 1.0 if whole is None else whole / sum(module.residuals for module in modules)
    return float(FORMS[method]([ModuleActivations(m.inputs, scale * m.residuals) for m in modules]))
