"""VJPs that hold no weights, and no copies of them in another type or shape."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.algorithms._functions import make_forward, make_pull
from fr_jax.algorithms._stages import KeyStream
from fr_jax.algorithms._vjp import needed

B, T, WIDTH = 2, 5, 12
LAYERS = {
    "dense": lambda: nn.Dense(WIDTH),
    "bfloat16": lambda: nn.Dense(WIDTH, dtype=jnp.bfloat16),
    "attention": lambda: nn.MultiHeadDotProductAttention(2, dtype=jnp.bfloat16, dropout_rate=0.5),
}


@pytest.fixture(params=LAYERS)
def stage(request):
    layer = fr.from_linen(LAYERS[request.param]())
    return fr.chain(layer, fr.from_linen(nn.LayerNorm()), layer)


def apply(stage, *, keep_weights):
    """A forward pass, and (vjp, what its pull is given, gradients)."""
    x = jax.random.normal(jax.random.key(1), (B, T, WIDTH))
    params, state = stage.init(jax.random.key(0), x)
    stream = KeyStream(jax.random.key(2), jnp.zeros((), jnp.int32))
    h, vjp, _, _ = make_forward(stage, input_gradient=True, keep_weights=keep_weights)(params, state, stream, x)
    weights = () if keep_weights else needed(vjp, params)
    pull = make_pull(None, input_gradient=True)
    delta = jnp.cos(jnp.arange(h.size, dtype=h.dtype)).reshape(h.shape)
    cost = pull.lower(vjp, delta, weights).compile().cost_analysis()
    return vjp, weights, params, pull(vjp, delta, weights), cost


def test_residuals_are_activations_alone(stage):
    vjp, weights, params, without, cost = apply(stage, keep_weights=False)
    sizes = lambda tree: {leaf.size for leaf in jax.tree.leaves(tree)}
    assert WIDTH * WIDTH in sizes(params) and WIDTH * WIDTH not in sizes(vjp)
    kept_vjp, _, _, kept, kept_cost = apply(stage, keep_weights=True)
    chex.assert_trees_all_equal(without, kept)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(vjp) < size(kept_vjp)
    # The weights that the pull is given are those of products, without biases; and it repeats no product.
    assert 0 < len(jax.tree.leaves(weights)) < len(jax.tree.leaves(params))
    assert cost["flops"] <= 1.1 * kept_cost["flops"]


def test_equal_forward_passes_have_equal_structures():
    """One history holds the VJPs of init and of all steps."""
    stage = fr.from_linen(LAYERS["attention"]())
    x = jnp.ones((B, T, WIDTH))
    params, state = stage.init(jax.random.key(0), x)
    forward = make_forward(stage, input_gradient=False, keep_weights=False)
    found = {
        jax.tree.structure(forward(params, state, KeyStream(jax.random.key(n), jnp.asarray(n, jnp.int32)), x + n)[1])
        for n in range(3)
    }
    assert len(found) == 1


def test_constants_are_left_out_too():
    mask = fr.Stage(
        lambda key, x: ({"w": jnp.ones(4)}, ()),
        lambda p, s, x, *, key=None, train=True: (jnp.where((jnp.arange(4) > 1)[None], x * p["w"][None], 0.0), s),
    )
    x = jnp.ones((3, 4))
    params, state = mask.init(jax.random.key(0), x)
    _, vjp, _, _ = make_forward(mask, input_gradient=True, keep_weights=False)(
        params, state, KeyStream(jax.random.key(0), jnp.zeros((), jnp.int32)), x
    )
    assert [leaf.shape for leaf in jax.tree.leaves(vjp)] == [(3, 4)]
    grads, delta = make_pull(None, input_gradient=True)(vjp, jnp.ones((3, 4)), needed(vjp, params))
    np.testing.assert_array_equal(grads["w"], [0, 0, 3, 3])
    np.testing.assert_array_equal(delta, np.tile([0, 0, 1, 1], (3, 1)))


@pytest.mark.parametrize("given", ["all", "needed"])
def test_none_in_params_is_not_a_weight(given):
    """Layers without a bias may have None in its place."""
    scale = fr.Stage(
        lambda key, x: ({"bias": None, "kernel": jnp.full((3, 3), 2.0)}, ()),
        lambda p, s, x, *, key=None, train=True: (x @ p["kernel"], s),
    )
    x = jnp.ones((2, 3))
    params, state = scale.init(jax.random.key(0), x)
    stream = KeyStream(jax.random.key(0), jnp.zeros((), jnp.int32))
    _, vjp, _, _ = make_forward(scale, input_gradient=True, keep_weights=False)(params, state, stream, x)
    weights = params if given == "all" else needed(vjp, params)
    grads, delta = make_pull(None, input_gradient=True)(vjp, jnp.ones((2, 3)), weights)
    assert grads["bias"] is None
    np.testing.assert_array_equal(grads["kernel"], np.full((3, 3), 2.0))
    np.testing.assert_array_equal(delta, np.full((2, 3), 6.0))


@pytest.mark.parametrize("inner", [lambda f: f, jax.jit])
def test_what_a_stage_prints_is_not_repeated(inner):
    """What is made again in the backward pass is of weights alone: not a callback on zeros."""
    seen = []

    @inner
    def apply(w, x):
        jax.debug.callback(seen.append, x.sum())
        return jnp.tanh(x @ w.astype(jnp.bfloat16))

    stage = fr.Stage(lambda key, x: (jnp.ones((3, 3)), ()), lambda p, s, x, *, key=None, train=True: (apply(p, x), s))
    stream, x = KeyStream(jax.random.key(0), jnp.zeros((), jnp.int32)), jnp.ones((2, 3))
    params, state = stage.init(jax.random.key(0), x)
    _, vjp, _, _ = make_forward(stage, input_gradient=True, keep_weights=False)(params, state, stream, x)
    jax.block_until_ready(make_pull(None, input_gradient=True)(vjp, jnp.ones((2, 3)), params))
    jax.effects_barrier()
    assert [float(value) for value in seen] == [6.0]
