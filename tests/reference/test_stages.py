import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fr_jax.reference.stages import init_layers, mean_squared_error, relu_stage, sgd_update


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("linear_output", [False, True])
@pytest.mark.parametrize("widths", [(3, 4), (3, 5, 2, 4)])
def test_relu_stage_equals_jax(widths, linear_output):
    rng = np.random.default_rng(0)
    layers = tuple((W, rng.standard_normal(len(b))) for W, b in init_layers(rng, widths))
    h, dy = rng.standard_normal((6, widths[0])), rng.standard_normal((6, widths[-1]))

    def forward(w, z):
        for j, (W, b) in enumerate(w):
            z = z @ W.T + b[None]
            z = z if linear_output and j == len(w) - 1 else jax.nn.relu(z)
        return z

    y, pull = relu_stage(len(layers), linear_output=linear_output)(layers, h, 0)

    def forward_and_backward(layers, h, dy):
        y, vjp = jax.vjp(forward, layers, h)
        return y, vjp(dy)

    expected = jax.jit(forward_and_backward)(layers, h, dy)
    chex.assert_trees_all_close((y, pull(dy)), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_mean_squared_error_equals_jax():
    outputs, targets = np.random.default_rng(0).standard_normal((2, 6, 3))
    expected = jax.value_and_grad(lambda o: ((o - targets) ** 2).sum(-1).mean())(jnp.asarray(outputs))
    chex.assert_trees_all_close(mean_squared_error(outputs, targets), expected, rtol=1e-12)


def test_update_keeps_the_nesting():
    Pair = collections.namedtuple("Pair", "a b")
    one = np.ones(2)
    w = {"list": [one, (one,)], "pair": Pair(one, [])}
    expected = {"list": [0 * one, (0 * one,)], "pair": Pair(0 * one, [])}
    new = sgd_update(0.5)(w, jax.tree.map(lambda leaf: 2 * leaf, w))
    assert isinstance(new["pair"], Pair)
    chex.assert_trees_all_equal(new, expected)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="a stage of 0 layers"):
        relu_stage(0)
    with pytest.raises(ValueError, match="weights of 1 layers for a stage of 2"):
        relu_stage(2)(init_layers(np.random.default_rng(0), (2, 2)), np.ones((1, 2)), 0)
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 1\) and targets of shape \(2,\)"):
        mean_squared_error(np.ones((2, 1)), np.ones(2))
    for widths in [(3,), (3, 0)]:
        with pytest.raises(ValueError, match="make no layer"):
            init_layers(np.random.default_rng(0), widths)
