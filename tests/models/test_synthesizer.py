import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fr_jax.models import synthesizer
from fr_jax.types import Stage


def jitted(*args, **kwargs):
    """Each of its functions compiled whole, not operation by operation."""
    M = synthesizer(*args, **kwargs)
    return Stage(jax.jit(M.init), jax.jit(M.apply))


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 8, 8, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_prediction_is_like_the_feature_and_zero_at_first(shape, dtype):
    h = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    M = jitted(dtype=dtype)
    params, state = M.init(jax.random.key(1), h)
    delta, new_state = M.apply(params, state, h)
    assert (delta.shape, delta.dtype) == (h.shape, h.dtype)
    assert not delta.any()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state, new_state)
    assert all(jax.tree.leaves(moved))  # two batch normalisations


def test_layers_of_the_paper():
    """Two hidden 5x5 convolutions with batch normalisation, one 5x5 output convolution, padding 2 everywhere."""
    h = jnp.ones((2, 8, 8, 4))
    params, _ = jitted(hidden=16).init(jax.random.key(0), h)
    kernels = {name: p["kernel"].shape for name, p in params.items() if name.startswith("Conv")}
    assert kernels == {"Conv_0": (5, 5, 4, 16), "Conv_1": (5, 5, 16, 16), "Conv_2": (5, 5, 16, 4)}
    assert sum(name.startswith("BatchNorm") for name in params) == 2
    assert ["bias" in params[name] for name in ("Conv_0", "Conv_1", "Conv_2")] == [False, False, True]


@pytest.mark.parametrize("shape", [(6, 5), (6, 8, 8, 5)])
def test_labels_are_seen(shape):
    h = jnp.ones(shape)
    labels = jnp.arange(6) % 3
    M = jitted(3)
    params, state = M.init(jax.random.key(0), (h, labels))
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    delta, _ = M.apply(params, state, (h, labels))
    same = np.asarray(delta).reshape(6, -1)
    np.testing.assert_allclose(same[0], same[3], rtol=1e-5)
    assert not np.allclose(same[0], same[1])


def test_it_works_in_units_of_one_examples_loss():
    """Twice the batch, each example twice: half the gradient of the mean."""
    h = jax.random.normal(jax.random.key(0), (4, 5))
    M = jitted()
    params, state = M.init(jax.random.key(1), h)
    params["Dense_2"]["kernel"] += 1.0
    once, _ = M.apply(params, state, h)
    twice, _ = M.apply(params, state, jnp.concatenate([h, h]))
    np.testing.assert_allclose(twice[:4], once / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("num_classes", "feature", "given"),
    [
        (None, (jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)), r"num_classes = None was given \(h, labels\)"),
        (10, jnp.ones((2, 3)), "num_classes = 10 was given h alone. Make it with .* for label_conditioning=True"),
        (None, {"a": jnp.ones((2, 3))}, "num_classes = None was given .*; a feature must be one array|one array"),
    ],
)
def test_labels_without_classes_and_the_other_way_round(num_classes, feature, given):
    with pytest.raises(ValueError, match=given):
        synthesizer(num_classes).init(jax.random.key(0), feature)


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"num_classes": 0}])
def test_sizes_are_checked(wrong):
    with pytest.raises(ValueError, match="it must be at least 1, or None"):
        synthesizer(**wrong)
