import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 2 * 12).reshape(2, 3, 4)


def sizes(layers, x=X):
    params, state = jax.eval_shape(fr.chain(*layers).init, KEY, x)
    assert state == ({},) * len(layers)
    return [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]


def test_depth_width_and_classes():
    layers = fr.models.mlp(num_classes=5, depth=3, width=7)
    assert len(layers) == 3 and layers[0] is not layers[2]
    assert sizes(layers) == [(7,), (12, 7), (7,), (7, 7), (5,), (7, 5)]
    assert sizes(fr.models.mlp(hidden=[6, 4])) == [(6,), (12, 6), (4,), (6, 4), (10,), (4, 10)]
    assert len(fr.models.mlp(depth=1)) == 1


def test_it_is_dense_layers_with_relu():
    net = fr.chain(*fr.models.mlp(num_classes=5, depth=2, width=7))
    params, state = jax.jit(net.init)(KEY, X)
    first, last = (p["Dense_0"] for p in jax.tree.map(np.asarray, params))
    hidden = np.maximum(np.asarray(X).reshape(2, 12) @ first["kernel"] + first["bias"], 0)
    expected = hidden @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(net.apply(params, state, X, key=KEY)[0], expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_random_in_training_only():
    layer, output = fr.models.mlp(depth=2, width=100, dropout_rate=0.5)
    params, state = jax.jit(layer.init)(KEY, X)
    plain = layer.apply(params, state, X, train=False)[0]
    one, two = (layer.apply(params, state, X, key=jax.random.key(i), train=True)[0] for i in (1, 2))
    assert not np.array_equal(one, two)
    assert 0.35 < float((one[plain > 0] == 0).mean()) < 0.65
    np.testing.assert_allclose(one[one > 0], 2 * plain[one > 0], rtol=1e-6)
    params, state = jax.jit(output.init)(KEY, plain)
    np.testing.assert_array_equal(*(output.apply(params, state, plain, key=KEY, train=t)[0] for t in (True, False)))


def test_dtypes():
    layers = fr.models.mlp(3, jnp.bfloat16, depth=2, width=4)
    params, state = jax.eval_shape(fr.chain(*layers).init, KEY, X)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    h, dtypes = X, []
    for layer, p, s in zip(layers, params, state, strict=True):
        h, _ = jax.eval_shape(functools.partial(layer.apply, train=False), p, s, h)
        dtypes.append(h.dtype)
    assert dtypes == [jnp.bfloat16, jnp.float32]


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="depth = 0; a network has at least 1 layer"):
        fr.models.mlp(depth=0)
    with pytest.raises(TypeError, match="heads"):
        fr.models.mlp(heads=3)
