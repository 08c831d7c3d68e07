"""σ, cosine and norm ratio against NumPy, and that measuring disturbs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import fr_jax as fr
from fr_jax.diagnostics.sufficient_direction import (
    Direction,
    _add,
    _mean,
    directions,
    full_gradient,
    sampled_gradient,
    whole,
)

K, ROWS = 3, 6


class Block(nn.Module):
    """Dense, batch norm, dropout: everything whose state a measurement could disturb."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dropout(0.3, deterministic=not train)(nn.tanh(x))


def squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def batches(count, start=0):
    def one(seed):
        x, y = np.random.default_rng(seed).standard_normal((2, ROWS, 5))
        return fr.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))

    return [one(seed) for seed in range(start, start + count)]


def dense_stages(dtype=jnp.float32):
    return [fr.from_linen(nn.Sequential([nn.Dense(5, param_dtype=dtype), nn.tanh])) for _ in range(K)]


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("devices", [1, K])
def test_the_gradient_is_that_of_the_mean_loss(x64, devices):
    stages, data = dense_stages(jnp.float64), [jax.tree.map(lambda a: a.astype(jnp.float64), one) for one in batches(4)]
    places = fr.placement(K, jax.devices()[:devices])
    method = fr.features_replay(stages, squared, optax.sgd(0.1), placement=places)
    state = method.init(jax.random.key(1), data[0])
    for one in data:
        state, _ = method.step(state, one)
    found = full_gradient(stages, squared, data[0], placement=places)(state, iter(data))

    def mean_loss(params):
        total = 0.0
        for one in data:
            h = one.inputs
            for k, stage in enumerate(stages):
                h, _ = stage.apply(params[k], state.model_state[k], h)
            total += squared(h, one.targets)
        return total / len(data)

    params = jax.device_put(state.params, jax.devices()[0])
    for mine, expected in zip(found, jax.grad(mean_loss)(params), strict=True):
        np.testing.assert_allclose(flat(mine), flat(expected), rtol=1e-10, atol=1e-12)
    assert [leaf.devices() for leaf in jax.tree.leaves(found)] == [x.devices() for x in jax.tree.leaves(state.params)]


def test_the_three_numbers_follow_their_definitions():
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2)}
    gradients, grads = [draw(), draw()], [draw(), draw()]
    found = [one.read() for one in directions(gradients, grads)]
    for one, gradient, g in zip(found, map(flat, gradients), map(flat, grads), strict=True):
        assert one.sigma == pytest.approx(gradient @ g / (gradient @ gradient), rel=1e-5)
        assert one.cosine == pytest.approx(
            gradient @ g / np.linalg.norm(gradient) / np.linalg.norm(g), rel=1e-5, abs=1e-6
        )
        assert one.norm_ratio == pytest.approx(np.linalg.norm(g) / np.linalg.norm(gradient), rel=1e-5)
    both, gradient, g = whole(found), flat(gradients), flat(grads)
    assert both.sigma == pytest.approx(gradient @ g / (gradient @ gradient), rel=1e-5)
    assert both.norm_ratio == pytest.approx(np.linalg.norm(g) / np.linalg.norm(gradient), rel=1e-5)


@pytest.mark.parametrize("factory", [fr.backprop, fr.ddg, fr.features_replay])
def test_a_direction_that_is_the_gradient_has_ones(factory):
    """With no step size a stale gradient is today's, on the same data (oracle 4)."""
    stages, (one,) = dense_stages(), batches(1)
    method = factory(stages, squared, optax.sgd(0.0), return_grads=True)
    state = method.init(jax.random.key(0), one)
    for _ in range(2 * K):
        before, (state, info) = state, method.step(state, one)
    for found in directions(full_gradient(stages, squared, one)(before, [one]), info.grads):
        got = found.read()
        np.testing.assert_allclose([got.sigma, got.cosine, got.norm_ratio], 1, rtol=1e-5)


def test_stages_that_do_not_move_yet_have_zero():
    stages, (one,) = dense_stages(), batches(1)
    method = fr.features_replay(stages, squared, optax.sgd(0.1), return_grads=True)
    state = method.init(jax.random.key(0), one)
    gradients = full_gradient(stages, squared, one)(state, [one])
    _, info = method.step(state, one)
    assert [round(found.read().sigma, 4) for found in directions(gradients, info.grads)] == [0, 0, 1]
    assert np.isnan(Direction(1.0, -1.0, 1.0).sigma) and np.isnan(whole([Direction(1.0, -1.0, 1.0)]).norm_ratio)
    assert np.isnan(Direction(0.0, 0.0, 1.0).sigma) and np.isnan(Direction(0.0, 1.0, 0.0).cosine)


def test_the_square_of_a_sampled_gradient_is_the_mean_over_pairs(x64):
    stages, data = dense_stages(jnp.float64), [jax.tree.map(lambda a: a.astype(jnp.float64), one) for one in batches(5)]
    state = fr.backprop(stages, squared, optax.sgd(0.1)).init(jax.random.key(1), data[0])
    each = [full_gradient(stages, squared, data[0])(state, [one]) for one in data]
    found = sampled_gradient(stages, squared, data[0])(state, data)
    for k in range(K):
        g = [flat(one[k]) for one in each]
        pairs = [g[i] @ g[j] for i in range(5) for j in range(5) if i != j]
        np.testing.assert_allclose(found.square[k], np.mean(pairs), rtol=1e-10)
        np.testing.assert_allclose(flat(found.mean[k]), np.mean(g, axis=0), rtol=1e-10, atol=1e-14)
    (alone,) = directions(sampled_gradient(stages, squared, data[0])(state, data[:1]), each[0])[:1]
    np.testing.assert_allclose([alone.sigma, alone.cosine, alone.norm_ratio], 1, rtol=1e-10)


def test_a_sample_s_noise_is_not_in_the_square():
    """Gradients with a known mean and ten times as much noise: a mean's norm is too large, the estimate is not."""
    stage = fr.Stage(
        lambda key, x: (jnp.zeros(x.shape[1:]), ()),
        lambda params, state, x, *, key=None, train=True: (x * params[None], ()),
    )
    summed = lambda outputs, targets: jnp.sum(jnp.mean(outputs, axis=0))  # its gradient is the mean of the inputs
    rng, size = np.random.default_rng(0), 20_000
    draw = lambda: fr.Batch(jnp.asarray(1 + 10 * rng.standard_normal((1, size)), jnp.float32), jnp.zeros(1))
    state = fr.backprop([stage], summed, optax.sgd(0.1)).init(jax.random.key(0), draw())
    sample = sampled_gradient([stage], summed, draw())(state, [draw() for _ in range(20)])
    assert float(optax.tree.norm(sample.mean)) ** 2 > 5 * size
    (found,) = (one.read() for one in directions(sample, [jnp.ones(size)]))
    assert found.gradient_square == pytest.approx(size, rel=0.2)
    assert found.sigma == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("mean", [0.0, 0.05, 1.0])
def test_the_noise_of_the_square_is_its_standard_error(x64, mean):
    """Against the spread over 400 samples of 12; where there is a gradient, between half of it and all."""

    def square_and_noise(gradients):
        total, products = gradients[0], []
        for one in gradients[1:]:
            total, product = _add(total, one)
            products.append(product)
        return _mean(total, products)[1:]

    gradients = mean + np.random.default_rng(0).standard_normal((400, 12, 30))
    squares, noises = map(np.asarray, jax.jit(jax.vmap(square_and_noise))(gradients))
    spread, typical = float(np.std(squares)), float(np.sqrt(np.mean(noises**2)))
    assert np.mean(squares) == pytest.approx(30 * mean**2, abs=4 * spread / 20)
    assert (0.9 if mean < 0.1 else 0.5) * spread < typical < 1.1 * spread
    assert np.mean(squares > 2 * noises) < 0.07 or mean > 0


def test_a_gradient_without_noise_stands_out_and_one_of_noise_does_not():
    (one,) = batches(1)
    stages = dense_stages()
    state = fr.backprop(stages, squared, optax.sgd(0.1)).init(jax.random.key(0), one)
    sampled = sampled_gradient(stages, squared, one)
    for copies in (1, 2, 5):
        found = sampled(state, [one] * copies)
        assert np.isnan(found.square_noise[0]) == (copies < 3)
        assert all(each.stands_out and each.read().stands_out for each in directions(found, found.mean))
    assert float(found.square_noise[0]) < 1e-5 * float(found.square[0])
    exact = directions(found.mean, found.mean)
    assert [float(each.square_noise) for each in exact] == [0, 0, 0] and whole(exact).stands_out
    assert not Direction(1.0, 1.0, 1.0, 0.5).stands_out and not Direction(1.0, -1.0, 1.0, 0.0).stands_out
    assert whole([Direction(1.0, 9.0, 1.0, 3.0), Direction(1.0, 2.0, 1.0, 4.0)]).square_noise == 5


def test_measuring_disturbs_no_bit_of_training():
    """Batch statistics, dropout keys and weights go on as if nobody had looked."""
    stages, data = [fr.from_linen(Block()) for _ in range(K)], batches(6)
    method = fr.features_replay(stages, squared, optax.sgd(0.1, momentum=0.9))
    gradient = full_gradient(stages, squared, data[0])
    ends = []
    for looked_at in (False, True):
        state = method.init(jax.random.key(2), data[0])
        for one in data:
            if looked_at:
                jax.block_until_ready(gradient(state, data[:3]))
            state, _ = method.step(state, one)
        ends.append(state)
    for a, b in zip(*map(jax.tree.leaves, (ends[0].params, ends[1].params)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (ends[0].model_state, ends[1].model_state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_compared_is_said():
    (one,) = batches(1)
    stages = dense_stages()
    state = fr.backprop(stages, squared, optax.sgd(0.1)).init(jax.random.key(0), one)
    with pytest.raises(ValueError, match="return_grads=True"):
        directions(state.params, None)
    with pytest.raises(ValueError, match="3 gradients were given with 1 directions"):
        directions(state.params, state.params[:1])
    with pytest.raises(ValueError, match="at least one"):
        full_gradient(stages, squared, one)(state, [])
