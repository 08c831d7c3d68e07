import numpy as np
import pytest

from fr_jax.reference import network
from fr_jax.reference.counting import Multiplications


def scalar_prediction(params, x):
    """The lecture's forward pass, one node at a time."""
    z = [float(v) for v in x]
    for W in params.weights:
        z = [max(0.0, sum(float(w) * v for w, v in zip(row, z, strict=True))) for row in W]
    return sum(float(a) * v for a, v in zip(params.alpha, z, strict=True)) + float(params.b)


@pytest.mark.parametrize("widths", [(3,), (3, 4), (2, 5, 3, 4), (1, 1, 1)])
def test_forward_pass_is_the_lectures(make_problem, widths):
    params, x, y = make_problem(widths)
    trace = network.forward(params, x)
    np.testing.assert_allclose(trace.y_hat, [scalar_prediction(params, row) for row in x], rtol=1e-12)
    assert len(trace.z) == len(widths) and len(trace.u) == len(widths) - 1
    for u, z in zip(trace.u, trace.z[1:], strict=True):
        np.testing.assert_array_equal(z, np.maximum(u, 0))
    for n, row in enumerate(x):
        one = network.forward(params, row)
        np.testing.assert_allclose(one.y_hat, trace.y_hat[n], rtol=1e-12)
        assert [z.shape for z in one.z] == [(width,) for width in widths]
    assert network.loss(params, x, y) == pytest.approx(np.mean((trace.y_hat - y) ** 2))
    assert network.loss(params, x[0], y[0]) == pytest.approx((trace.y_hat[0] - y[0]) ** 2)


@pytest.mark.parametrize("examples", [1, 5])
def test_forward_pass_multiplies_once_an_edge_and_example(make_problem, examples):
    params, x, _ = make_problem((2, 5, 3, 4), examples)
    counter = Multiplications()
    network.forward(params, x, counter=counter)
    assert counter.count == examples * network.size(params)[0]


def test_size_of_the_graph():
    assert network.size(network.init(np.random.default_rng(0), (2, 5, 3))) == (10 + 15 + 3, 2 + 5 + 3 + 1)
    assert network.size(network.chain(np.ones(7), 1.0)) == (8, 9)


def test_weights_have_the_variance_of_he():
    params = network.init(np.random.default_rng(0), (50, 400, 300))
    assert [W.dtype for W in params.weights] == [np.float64] * 2
    assert np.var(params.weights[0]) == pytest.approx(2 / 50, rel=0.05)
    assert np.var(params.weights[1]) == pytest.approx(2 / 400, rel=0.05)
    assert np.var(params.alpha) == pytest.approx(1 / 300, rel=0.3)


@pytest.mark.parametrize(
    ("shapes", "count"), [(((3, 2), (2, 4)), 24), (((3, 2), (2,)), 6), (((2,), (2, 4)), 8), (((5,), (5,)), 5)]
)
def test_counter_counts_what_it_multiplies(shapes, count):
    counter = Multiplications()
    a, b = (np.random.default_rng(0).standard_normal(shape) for shape in shapes)
    np.testing.assert_array_equal(counter.matmul(a, b), a @ b)
    assert counter.count == count
    counter.times(np.ones((3, 1)), np.ones((1, 4)))
    assert counter.count == count + 12


def test_bad_input_is_refused(make_problem):
    params, x, y = make_problem((3, 4))
    with pytest.raises(ValueError, match=r"x of shape \(5, 2\) does not fit a network of 3 inputs"):
        network.forward(params, x[:, :2])
    with pytest.raises(ValueError, match=r"y of shape \(5, 1\) for x of shape \(5, 3\): give one target per example"):
        network.loss(params, x, y[:, None])
    with pytest.raises(ValueError, match=r"x of shape \(0, 3\) does not fit"):
        network.loss(params, x[:0], y[:0])
    for widths in [(), (3, 0)]:
        with pytest.raises(ValueError, match="make no network"):
            network.init(np.random.default_rng(0), widths)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2,\) cannot be multiplied"):
        Multiplications().matmul(np.ones((2, 3)), np.ones(2))
