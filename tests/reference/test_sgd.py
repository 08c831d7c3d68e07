import chex
import numpy as np
import pytest

from fr_jax.reference import backpropagation, chain_rule, network, sgd


def data(seed=0, n=64):
    rng = np.random.default_rng(seed)
    teacher = network.init(rng, (3, 4))._replace(b=0.5)
    x = rng.standard_normal((n, 3))
    return x, network.forward(teacher, x).y_hat, network.init(rng, (3, 16, 8))


def test_fits_a_teacher():
    x, y, start = data()
    settings = {"epochs": 150, "batch_size": 8, "learning_rate": 0.03}
    params, losses = sgd.train(start, x, y, rng=np.random.default_rng(1), **settings)
    assert losses[-1] < 0.01 * network.loss(start, x, y)
    assert losses[-1] == pytest.approx(network.loss(params, x, y), rel=1e-12)
    assert len(losses) == 150


def test_each_step_is_the_lectures():
    x, y, start = data(n=12)
    params, _ = sgd.train(start, x, y, epochs=2, batch_size=4, learning_rate=0.1, rng=np.random.default_rng(5))
    rng, theta = np.random.default_rng(5), start
    for _ in range(2):
        order = rng.permutation(12)
        assert sorted(order) == list(range(12))
        for i in range(3):
            examples = order[4 * i : 4 * (i + 1)]
            gradients = [backpropagation.loss_gradients(theta, x[n], y[n]) for n in examples]
            g = network.map_params(lambda *one: sum(one) / 4, *gradients)
            theta = network.map_params(lambda theta, g: theta - 0.1 * g, theta, g)
    chex.assert_trees_all_close(params, theta, rtol=1e-12)
    chex.assert_trees_all_equal(start, data(n=12)[2])


def test_naive_gradients_give_the_same_training():
    x, y, start = data(n=8)
    runs = [
        sgd.train(
            start, x, y, epochs=2, batch_size=4, learning_rate=0.05, rng=np.random.default_rng(2), gradients=gradients
        )
        for gradients in (chain_rule.loss_gradients, backpropagation.loss_gradients)
    ]
    chex.assert_trees_all_close(*runs, rtol=1e-11)


@pytest.mark.parametrize("batch_size", [0, 5, 128])
def test_batches_must_split_the_data(batch_size):
    x, y, start = data()
    with pytest.raises(ValueError, match=f"64 examples cannot be split into batches of {batch_size}"):
        sgd.train(start, x, y, epochs=1, batch_size=batch_size, learning_rate=0.1, rng=np.random.default_rng(0))
