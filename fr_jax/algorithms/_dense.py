"""Dense networks for methods that know no others: their sizes, layers and targets."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fr_jax.stages import chain
from fr_jax.types import Array, PyTree, Stage


def check_sizes(layer_sizes: Sequence[int], method: str) -> tuple[int, ...]:
    """The numbers of units, inputs first; raises ValueError for anything else, such as stages."""
    given: Any = layer_sizes
    sizes = tuple(given.tolist() if hasattr(given, "tolist") else given) if not isinstance(given, Stage | int) else ()
    whole = lambda n: isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 1
    if len(sizes) < 2 or not all(map(whole, sizes)):
        raise ValueError(
            f"layer_sizes = {given!r} was given; {method} trains dense networks only, and makes them itself: give two "
            "or more whole numbers, those of the inputs, of the units of each hidden layer and of the outputs, such as "
            "(784, 256, 10)."
        )
    return tuple(map(int, sizes))


def dense_network(sizes: Sequence[int], activation: Callable[[Array], Array]) -> Stage:
    """A chain of dense layers ``{"kernel": (n, m), "bias": (m,)}``, with the activation after all but the last.

    Kernels are uniform with variance 2 / (n + m) (Glorot, Bengio 2010), biases 0.
    """
    activations = [*(activation,) * (len(sizes) - 2), lambda x: x]
    return chain(*map(_dense, sizes, sizes[1:], activations))


def _dense(inputs: int, units: int, activation: Callable[[Array], Array]) -> Stage:
    def init(key: Array, x: Array) -> tuple[PyTree, PyTree]:
        given, dtype = math.prod(x.shape[1:]), jnp.result_type(float)
        if given != inputs:
            raise ValueError(
                f"inputs of shape {x.shape} have {given} values for each example, and layer_sizes begin with {inputs}. "
                f"Begin them with {given}."
            )
        bound = math.sqrt(6 / (inputs + units))
        kernel = jax.random.uniform(key, (inputs, units), dtype, -bound, bound)
        return {"kernel": kernel, "bias": jnp.zeros(units, dtype)}, ()

    def apply(params: PyTree, state: PyTree, x: Array, /, *, key: Any = None, train: bool = True) -> tuple[Array, Any]:
        return activation(affine(params, x)), state

    return Stage(init, apply)


def affine(params: PyTree, x: Array) -> Array:
    """``x W + b``; an example of any shape is flattened."""
    kernel, bias = params["kernel"], params["bias"]
    return x.reshape(x.shape[0], -1).astype(kernel.dtype) @ kernel + bias[None]


def goals(targets: Array, outputs: Array) -> Array:
    """What the outputs ``(B, n)`` should be: targets ``(B, n)``, or 0 and 1 for labels ``(B,)``."""
    n = outputs.shape[1]
    if jnp.issubdtype(targets.dtype, jnp.integer) and targets.ndim == 1:
        return targets.astype(outputs.dtype)[:, None] if n == 1 else jax.nn.one_hot(targets, n, dtype=outputs.dtype)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets {targets.dtype} of shape {targets.shape} were given for {n} outputs; they must be labels (B,), "
            f"whole numbers, or numbers (B, {n})."
        )
    return targets.astype(outputs.dtype)
