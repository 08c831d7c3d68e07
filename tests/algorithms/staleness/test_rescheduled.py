import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import staleness

close = {"rtol": 1e-11, "atol": 1e-12}


def slowed(update, tau, J):
    """A naive optimizer ``(w, g) -> w``, with its step divided by tau^p."""
    j = 0

    def slow(w, g):
        nonlocal j
        p = 1 - min(j / J, 1)
        j += 1
        return jax.tree.map(lambda new, old: old + (new - old) / tau**p, update(w, g), w)

    return slow


@pytest.mark.usefixtures("x64")
def test_trajectory_equals_the_equation(naive, make_batches, run):
    """Features replay with Nesterov's momentum and weight decay; each stage counts its own updates."""
    K, J = 4, 5
    modules = [(naive.dense(3),), (naive.dense(4),), (naive.dense(3),), (naive.dense(2),)]
    ours, theirs = naive.OPTIMIZERS["nesterov"]
    optimizers = staleness.rescheduled(ours(), J, K)
    states, _ = run(
        fr.features_replay([naive.stage(m) for m in modules], naive.squared_error, optimizers), make_batches(12)
    )
    updates = [slowed(theirs(), max(1, K - k), J) for k in range(1, K + 1)]
    expected = naive.features_replay(modules, updates, states[0], make_batches(12), "play")
    for t, state in enumerate(states):
        chex.assert_trees_all_close(state.params, tuple(expected.w[k][t] for k in range(K)), **close)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("M", "tau"), [(1, 5.0), (2, 2.5), (8, 1.0)])
def test_adam_with_micro_batches_is_the_naive_one(naive, M, tau):
    rng = np.random.default_rng(0)
    J, w, expected, update = 3, *2 * [rng.normal(size=3)], slowed(naive.adam(0.1), tau, 3)
    first, *_ = staleness.rescheduled(optax.adam(0.1), J, K=6, microbatches=M)
    state = first.init(jnp.asarray(w))
    for _ in range(5):
        g = rng.normal(size=3)
        u, state = first.update(jnp.asarray(g), state)
        w, expected = w + u, update(expected, g)
        np.testing.assert_allclose(w, expected, **close)


def test_after_J_updates_it_is_gone_to_the_bit():
    adam, g = optax.adam(0.1), jnp.array([0.3, -2.0])
    first, *_ = staleness.rescheduled(adam, 3, K=4)
    state, plain = first.init(g), adam.init(g)
    for j in range(6):
        u, state = first.update(g, state)
        v, plain = adam.update(g, plain)
        assert np.array_equal(u, v) == (j >= 3)
    assert int(state.count) == 6


@pytest.mark.parametrize("inside", [True, False])
def test_under_accumulation_it_counts_updates(inside):
    sgd, m, J = optax.sgd(1.0), 3, 2
    if inside:
        optimizer = staleness.accumulate(staleness.rescheduled(sgd, J, K=5)[0], m)
    else:
        optimizer = staleness.rescheduled(staleness.accumulate(sgd, m), J, K=5)[0]
    state, steps = optimizer.init(jnp.zeros(())), []
    for _ in range(4 * m):
        u, state = optimizer.update(jnp.ones(()), state)
        steps.append(float(u))
    np.testing.assert_array_equal(steps, [0, 0, -0.25, 0, 0, -0.5, 0, 0, -1, 0, 0, -1])


def test_switched_off_it_is_not_there():
    sgd = optax.sgd(0.1)
    assert staleness.rescheduled(sgd, 0, K=4) == (sgd,) * 4
    assert [o is sgd for o in staleness.rescheduled(sgd, 9, K=4)] == [False, False, True, True]
    assert [o is sgd for o in staleness.rescheduled(sgd, 9, K=4, microbatches=3)] == [True] * 4


def test_the_loss_reaches_the_optimizer():
    by_loss = optax.contrib.reduce_on_plateau(patience=1)
    first, *_ = staleness.rescheduled(optax.chain(optax.sgd(1.0), by_loss), 2, K=3)
    state = first.init(jnp.ones(()))
    assert isinstance(first, optax.GradientTransformationExtraArgs)
    assert float(first.update(jnp.ones(()), state, value=jnp.ones(()))[0]) == -0.5


def test_low_precision_stays_low():
    first, *_ = staleness.rescheduled(optax.sgd(1.0), 2, K=5)
    w = jnp.ones(2, jnp.bfloat16)
    assert first.update(w, first.init(w))[0].dtype == jnp.bfloat16


sgd = optax.sgd(0.1)
multi = optax.MultiSteps(sgd, 2).gradient_transformation()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: staleness.rescheduled(sgd, -1, 2), "updates = -1 was given; it must be a whole number, at least 0"),
        (lambda: staleness.rescheduled(sgd, 1.5, 2), r"updates = 1\.5"),
        (lambda: staleness.rescheduled(sgd, 1, 0), "K = 0"),
        (lambda: staleness.rescheduled(sgd, 1, 2, 0), "microbatches = 0"),
        (lambda: staleness.rescheduled([sgd], 1, 2), "1 optimizers were given for K = 2 stages"),
        (lambda: staleness.rescheduled(multi, 1, 3)[0].init(jnp.ones(2)), "Use one fr_jax.staleness.accumulate"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
