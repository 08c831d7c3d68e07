"""The same bits as Flax draws, from functions that XLA compiles faster."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fr_jax.models.initializers import variance_scaling
from fr_jax.models.resnet import dropout


def test_weights_are_those_of_flax():
    """For kernels of four and of two axes, of each mode and distribution that the models use, in one compilation."""
    kinds = [
        ((2.0, "fan_out", "normal"), (3, 3, 2, 6)),
        ((2.0, "fan_in", "truncated_normal"), (5, 5, 3, 2)),
        ((2.0, "fan_in", "truncated_normal"), (20, 10)),
        ((1.0, "fan_out", "uniform"), (20, 10)),
    ]
    makers = (variance_scaling, nn.initializers.variance_scaling)
    draw = lambda key: [[make(*kind)(key, shape) for kind, shape in kinds] for make in makers]
    for mine, theirs in zip(*jax.jit(draw)(jax.random.key(3)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_another_dtype(x64):
    init, dtypes = variance_scaling(1.0, "fan_in", "normal"), (jnp.bfloat16, jnp.float64)
    drawn = [jax.eval_shape(lambda key, d=d: init(key, (2, 3), d), jax.random.key(0)) for d in dtypes]
    assert [one.dtype for one in drawn] == ["bfloat16", "float64"]


@pytest.mark.parametrize("mode", ["fan_avg", "in"])
def test_other_modes_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode = '{mode}'; it must be"):
        variance_scaling(1.0, mode, "normal")


class Both(nn.Module):
    """``(dropout, flax.linen.Dropout)`` of the same input and key."""

    rate: float
    flat: bool

    @nn.compact
    def __call__(self, x, train):
        return dropout(x, self.rate, train) if self.flat else nn.Dropout(self.rate, deterministic=not train)(x)


@pytest.mark.parametrize(("rate", "train"), [(0.3, True), (0.3, False), (0.0, True)])
def test_masks_are_those_of_flax(rate, train):
    x = jnp.linspace(1.0, 2.0, 6 * 4 * 4 * 5).reshape(6, 4, 4, 5)
    run = lambda key: [Both(rate, flat).apply({}, x, train, rngs={"dropout": key}) for flat in (True, False)]
    mine, theirs = jax.jit(run)(jax.random.key(1))
    np.testing.assert_array_equal(mine, theirs)
    assert (not mine.all()) == (train and rate > 0)


@pytest.mark.slow
def test_a_kernel_compiles_in_half_the_time():
    """That of Flax takes 1 to 2.5 s, this one 0.4 s (jax 0.10 and 0.11 on the CPU); if not, initializers.py can go."""
    seconds = []
    jax.config.update("jax_disable_most_optimizations", False)  # which is what takes the time
    try:
        for make in (variance_scaling, nn.initializers.variance_scaling):
            init = make(2.0, "fan_out", "normal")
            now = time.time() % 1000  # a constant of its own, or the code of an earlier run is found in the cache
            run = jax.jit(lambda key, init=init, now=now: init(key, (3, 3, 48, 40)) + now)
            lowered = run.lower(jax.random.key(0))
            start = time.process_time()
            lowered.compile()
            seconds.append(time.process_time() - start)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert seconds[0] < seconds[1] / 2
