"""Predicted and corrected weights; prediction without fading, and through a method, is in test_staleness.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fr_jax.algorithms import staleness

close = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("horizon", [0, 1, 3])
def test_fading_prediction_is_exact_if_no_gradient_comes(rng, horizon):
    b = 0.9
    optimizer = staleness.remember_update(optax.sgd(0.1, momentum=b))
    w = jnp.asarray(rng.normal(size=3))
    state = optimizer.init(w)
    for _ in range(2):
        u, state = optimizer.update(jnp.asarray(rng.normal(size=3)), state)
        w = w + u
    predicted = staleness.predicted(w, state, horizon, momentum=b)
    for _ in range(horizon):
        u, state = optimizer.update(jnp.zeros(3), state)
        w = w + u
    np.testing.assert_allclose(predicted, w, **close)


@pytest.mark.usefixtures("x64")
def test_fading_prediction_takes_fractions_and_tends_to_the_plain_one():
    state = staleness.RememberUpdateState(jnp.array(2.0), ())
    at = lambda *args, **kwargs: float(staleness.predicted(jnp.array(1.0), state, *args, **kwargs))
    np.testing.assert_allclose(at(3, momentum=0.9), 1 + 2 * (0.9 + 0.9**2 + 0.9**3), **close)
    np.testing.assert_allclose(at(2.5, momentum=0.9), 1 + 2 * (0.9 - 0.9**3.5) / (1 - 0.9), **close)
    np.testing.assert_allclose(at(2.5, momentum=1 - 1e-9), at(2.5), rtol=1e-6)
    assert at(3) == at(3, momentum=1) == 7
    assert at(3, momentum=0) == at(0, momentum=0.9) == at(3, strength=0, momentum=0.9) == 1
    assert at(3, 0.5, 0.5) == 1 + 0.5 * 2 * (0.5 + 0.25 + 0.125)


@pytest.mark.usefixtures("x64")
def test_under_accumulation_the_fading_counts_updates():
    optimizer = staleness.remember_update(staleness.accumulate(optax.sgd(1.0), 2))
    state = optimizer.init(jnp.array(0.0))
    for _ in range(3):  # one update, and one gradient put aside
        _, state = optimizer.update(jnp.array(-1.0), state)
    at = lambda horizon: float(staleness.predicted(jnp.array(0.0), state, horizon, momentum=0.5))
    np.testing.assert_allclose([at(h) for h in range(4)], [0, 0.5, 0.5, 0.75], **close)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("M", [1, 2])
def test_trend_and_corrected_weights_are_the_naive_ones(rng, M):
    K, k, D = 4, 1, 0.3
    tau = (K - k) / M
    g = D ** (1 / tau)
    optimizer = staleness.remember_trend(optax.adam(0.1), D, K, M)[k - 1]
    w = {"a": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(rng.normal(size=(2, 2)))}
    state, d = optimizer.init(w), jax.tree.map(np.zeros_like, w)
    update = jax.jit(optimizer.update)
    for _ in range(6):
        grads = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), w)
        u, state = update(grads, state, w)
        new = optax.apply_updates(w, u)
        d = jax.tree.map(lambda d, new, old: g * d + (1 - g) * (new - old), d, new, w)
        w = new
        chex.assert_trees_all_close(state.trend, d, **close)
        expected = jax.tree.map(lambda w, d: w - tau * d, w, d)
        chex.assert_trees_all_close(staleness.corrected(w, state, tau), expected, **close)


@pytest.mark.usefixtures("x64")
def test_corrected_weights_are_the_old_ones_where_the_gradient_is_constant():
    for optimizer, tau in zip(staleness.remember_trend(optax.sgd(0.1), 0.1, K=5), (4, 3, 2, 1), strict=False):
        w, state = [jnp.array([1.0, -2.0])], optimizer.init(jnp.zeros(2))
        for _ in range(60):
            u, state = optimizer.update(jnp.array([3.0, 0.5]), state)
            w.append(w[-1] + u)
        np.testing.assert_allclose(staleness.corrected(w[-1], state, tau), w[-1 - tau], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_without_decay_the_trend_is_the_last_update(rng):
    ours, theirs = staleness.remember_trend(optax.adam(0.1), 0, K=2)[0], staleness.remember_update(optax.adam(0.1))
    g = jnp.asarray(rng.normal(size=3))
    (_, a), (_, b) = ours.update(g, ours.init(g)), theirs.update(g, theirs.init(g))
    np.testing.assert_array_equal(a.trend, b.last_update)


def test_under_accumulation_the_trend_moves_with_the_updates():
    optimizer = staleness.remember_trend(staleness.accumulate(optax.sgd(1.0), 2), 0.5, K=2)[0]
    state, trends = optimizer.init(jnp.array(0.0)), []
    for _ in range(5):
        _, state = optimizer.update(jnp.array(-1.0), state)
        trends.append(float(state.trend))
    np.testing.assert_array_equal(trends, [0, 0.5, 0.5, 0.75, 0.75])


@pytest.mark.usefixtures("x64")
def test_under_accumulation_only_the_updates_since_then_are_taken_back():
    optimizer, start = staleness.accumulate(optax.sgd(0.1), 3), jnp.array([1.0, -2.0])
    optimizer = staleness.remember_trend(optimizer, 0.1, K=2)[0]
    w, state = [start], optimizer.init(start)
    for step in range(63):
        u, state = optimizer.update(jnp.array([3.0, 0.5]), state)
        w.append(w[-1] + u)
        for tau in range(6) if step >= 60 else ():
            np.testing.assert_allclose(staleness.corrected(w[-1], state, tau), w[-1 - tau], rtol=1e-9)


def test_a_trend_of_narrow_weights_is_wide():
    w = jnp.ones(2, jnp.bfloat16)
    optimizer = staleness.remember_trend(optax.sgd(1.0), 0.5, K=2)[0]
    _, state = optimizer.update(w, optimizer.init(w), w)
    assert state.trend.dtype == jnp.float32
    assert staleness.corrected(w, state, 1).dtype == jnp.bfloat16


def test_switched_off_they_are_not_there():
    sgd, w = optax.sgd(0.1), jnp.ones(2)
    assert staleness.remember_trend(sgd, 1, K=3) == (sgd,) * 3
    assert staleness.remember_trend(sgd, 0.5, K=3)[-1] is sgd
    assert staleness.corrected(w, (), 0) is w


sgd = optax.sgd(0.1)
multi = optax.MultiSteps(sgd, 2).gradient_transformation()
STATE = staleness.RememberUpdateState(jnp.ones(2), ())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: staleness.predicted(jnp.ones(2), STATE, 1, momentum=1.5), r"momentum = 1\.5 was given; .* 0 to 1"),
        (lambda: staleness.predicted(jnp.ones(2), STATE, -1), "horizon = -1 was given; it must be a number, 0 or more"),
        (lambda: staleness.remember_trend(sgd, -0.1, 2), r"decay = -0\.1 was given; it must be a number, 0 to 1"),
        (lambda: staleness.remember_trend(sgd, float("nan"), 2), "decay = nan"),
        (lambda: staleness.remember_trend(sgd, 0.5, 0), "K = 0"),
        (lambda: staleness.remember_trend(sgd, 0.5, 2, 0), "microbatches = 0"),
        (lambda: staleness.remember_trend([sgd], 0.5, 2), "1 optimizers were given for K = 2 stages"),
        (lambda: staleness.remember_trend(multi, 0.5, 2)[0].init(jnp.ones(2)), "Use one fr_jax.staleness.accumulate"),
        (lambda: staleness.corrected(jnp.ones(2), STATE, 1), "without a mean of updates. Wrap the optimizers"),
        (lambda: staleness.corrected(jnp.ones(2), STATE, float("inf")), "tau = inf was given"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
