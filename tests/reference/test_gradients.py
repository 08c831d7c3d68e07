"""The naive chain rule, back-propagation by hand, and jax.grad agree; and what the first two multiply."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fr_jax.reference import backpropagation, chain_rule, network
from fr_jax.reference.counting import Multiplications

METHODS = [chain_rule, backpropagation]
WIDTHS = [(3,), (3, 4), (2, 5, 3, 4), (1, 1, 1, 1), (6, 1, 6)]
close = {"rtol": 1e-11, "atol": 1e-13}


def predict(params, x):
    z = x
    for W in params.weights:
        z = jax.nn.relu(z @ W.T)
    return z @ params.alpha + params.b


def loss(params, x, y):
    return ((predict(params, x) - y) ** 2).mean()


def random_widths(seed):
    rng = np.random.default_rng(seed)
    return tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, 6)))


@jax.jit
def gradients_by_jax(theta, x, y):
    return jax.grad(loss)(theta, x, y), jax.vmap(jax.grad(predict), (None, 0))(theta, x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("widths", WIDTHS)
def test_gradients_equal_those_of_jax(make_problem, widths):
    params, x, y = make_problem(widths)
    of_loss, of_outputs = gradients_by_jax(jax.tree.map(jnp.asarray, params), x, y)
    for method in METHODS:
        chex.assert_trees_all_close(method.loss_gradients(params, x, y), of_loss, **close)
        for n in range(len(x)):
            grads = method.output_gradients(params, network.forward(params, x[n]))
            chex.assert_trees_all_close(grads, jax.tree.map(lambda array, n=n: array[n], of_outputs), **close)
            single = method.loss_gradients(params, x[n], y[n])
            chex.assert_trees_all_close(single, method.loss_gradients(params, x[n : n + 1], y[n : n + 1]), **close)


@pytest.mark.parametrize("seed", range(20))
def test_both_ways_agree_on_random_networks(make_problem, seed):
    params, x, y = make_problem(random_widths(seed), seed=seed)
    chex.assert_trees_all_close(*(method.loss_gradients(params, x, y) for method in METHODS), **close)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_differences_of_the_loss(make_problem, method):
    params, x, y = make_problem((2, 4, 3))
    leaves, structure = jax.tree.flatten(method.loss_gradients(params, x, y))
    arrays = [np.array(array) for array in jax.tree.leaves(params)]
    for array, grads in zip(arrays, leaves, strict=True):
        for index in np.ndindex(array.shape):
            value, losses = array[index].copy(), []
            for step in (1e-6, -1e-6):
                array[index] = value + step
                losses.append(network.loss(jax.tree.unflatten(structure, arrays), x, y))
            array[index] = value
            np.testing.assert_allclose(np.asarray(grads)[index], (losses[0] - losses[1]) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_relu_has_slope_0_at_0(method):
    params = network.Params((np.array([[1.0, 1.0], [1.0, 2.0]]),), np.array([1.0, 1.0]), 0.0)
    x = np.array([1.0, -1.0])  # u = (0, -1)
    grads = method.output_gradients(params, network.forward(params, x))
    assert not grads.weights[0].any()
    chex.assert_trees_all_equal(grads, jax.grad(predict)(jax.tree.map(jnp.asarray, params), x))


@pytest.mark.parametrize("T", [1, 2, 3, 10, 50])
def test_multiplications_for_the_lectures_chain(T):
    rng = np.random.default_rng(0)
    w, a, x = rng.uniform(0.5, 1.5, T), 1.3, 0.7
    params = network.chain(w, a)
    forward, naive, matrix_form = (Multiplications() for _ in range(3))
    trace = network.forward(params, np.array([x]), network.IDENTITY, forward)
    assert float(trace.y_hat) == pytest.approx(a * w.prod() * x)
    assert forward.count == T + 1
    for method, counter in zip(METHODS, (naive, matrix_form), strict=True):
        grads = method.output_gradients(params, trace, counter)
        np.testing.assert_allclose(np.ravel(grads.weights), a * w.prod() * x / w, rtol=1e-12)
        assert float(grads.alpha[0]) == pytest.approx(w.prod() * x)
    assert naive.count == sum(range(1, T + 1))
    assert matrix_form.count == 2 * T - 1


def multiplications(method, params, x):
    counter = Multiplications()
    method.output_gradients(params, network.forward(params, x), counter)
    return counter.count


def naive_formula(widths):
    """For each edge: 1 for σ' of its node, a column and σ' in the next layer, W and σ' in each later one, α."""
    total = 0
    for t in range(len(widths) - 1):
        later = widths[t + 2 :]
        cost, before = 1, 1
        for width in later:
            cost += width * before + width
            before = width
        total += widths[t] * widths[t + 1] * (cost + before)
    return total


def matrix_form_formula(widths):
    """An outer product and σ' a layer; Wᵀ in all but the first."""
    edges = [m * n for m, n in zip(widths, widths[1:], strict=False)]
    return sum(edges) + sum(edges[1:]) + sum(widths[1:])


@pytest.mark.parametrize("widths", [*WIDTHS, *(random_widths(seed) for seed in range(20))])
def test_multiplications_equal_the_closed_formulas_and_stay_below_the_bounds(make_problem, widths):
    params, x, _ = make_problem(widths, examples=1)
    naive, matrix_form = (multiplications(method, params, x[0]) for method in METHODS)
    assert naive == naive_formula(widths)
    assert matrix_form == matrix_form_formula(widths)
    E, V = network.size(params)
    assert naive <= E * (E + V)
    assert matrix_form <= 2 * E + V


def test_multiplications_of_a_batch_add_up(make_problem):
    params, x, y = make_problem((3, 4, 2), examples=6)
    E, _ = network.size(params)
    weights = E + 1
    naive, matrix_form = Multiplications(), Multiplications()
    chain_rule.loss_gradients(params, x, y, counter=naive)
    backpropagation.loss_gradients(params, x, y, counter=matrix_form)
    assert naive.count == 6 * (E + naive_formula((3, 4, 2)) + weights)
    assert matrix_form.count == 6 * (E + matrix_form_formula((3, 4, 2)) + 2 * 2)


@pytest.mark.parametrize(
    ("grown", "networks"),
    [
        ("chain", [(1,) * (T + 1) for T in (32, 64, 128)]),
        ("depth", [(4,) * (T + 1) for T in (16, 32, 64)]),
        ("width", [(n,) * 4 for n in (12, 18, 27)]),
    ],
)
def test_naive_way_grows_quadratically_and_backpropagation_linearly(make_problem, grown, networks):
    sizes, counts = [], {method: [] for method in METHODS}
    for widths in networks:
        params, x, _ = make_problem(widths, examples=1)
        sizes.append(sum(network.size(params)))
        for method in METHODS:
            counts[method].append(multiplications(method, params, x[0]))
    slopes = [np.polyfit(np.log(sizes), np.log(counts[method]), 1)[0] for method in METHODS]
    np.testing.assert_allclose(slopes, [2, 1], atol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_refused(make_problem, method):
    params, x, y = make_problem((3, 4))
    with pytest.raises(ValueError, match="the trace is of 5 examples"):
        method.output_gradients(params, network.forward(params, x))
    with pytest.raises(ValueError, match="give one target per example"):
        method.loss_gradients(params, x, y[:3])
    with pytest.raises(ValueError, match="does not fit a network of 3 inputs"):
        method.loss_gradients(params, x[:, :1], y)
