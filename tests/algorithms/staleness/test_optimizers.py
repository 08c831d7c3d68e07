import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import staleness

close = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture
def gradients():
    return np.random.default_rng(5).normal(size=(9, 3))


def path(optimizer, gradients, w=None):
    """The weights before the first update and after each."""
    w = jnp.zeros(gradients.shape[1:]) if w is None else w
    state, weights, update = optimizer.init(w), [np.asarray(w)], jax.jit(optimizer.update)
    for g in gradients:
        u, state = update(jnp.asarray(g), state, w)
        w = optax.apply_updates(w, u)
        weights.append(np.asarray(w))
    return weights


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("M", [1, 2])
def test_spike_compensation_is_the_equation(gradients, M):
    K, m, rate = 3, 0.9, 0.1
    for k, optimizer in enumerate(staleness.spike_compensation(rate, m, K, M), start=1):
        D, v, w, naive = (K - k) / M, 0.0, np.zeros(3), [np.zeros(3)]
        for g in gradients:
            v = m * v + g
            w = w - rate * (m**D * v + (1 - m**D) / (1 - m) * g)
            naive.append(w)
        np.testing.assert_allclose(path(optimizer, gradients), naive, **close)


@pytest.mark.usefixtures("x64")
def test_late_gradients_catch_up_with_punctual_ones(gradients):
    """From its arrival on, each has moved the weights as far as momentum without delay would have by then."""
    D, m = 3, 0.8
    late = np.concatenate([np.zeros((D, 3)), gradients])
    weights = path(staleness.spike_compensation(0.1, m, K=D + 1)[0], late)
    for t in range(D, len(late) + 1):
        arrived = gradients[: t - D]  # of the t updates so far, gradient s should have had t - s
        punctual = [(1 - m ** (t - s)) / (1 - m) * g for s, g in enumerate(arrived)]
        np.testing.assert_allclose(weights[t], -0.1 * np.sum(punctual, axis=0), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_spike_compensation_has_momentum_and_nesterov_as_special_cases(gradients):
    schedule = lambda count: 0.1 / (1 + count)
    late, last = staleness.spike_compensation(schedule, 0.9, K=2)
    nesterov, plain = optax.sgd(schedule, 0.9, nesterov=True), optax.sgd(schedule, 0.9)
    np.testing.assert_allclose(path(late, gradients), path(nesterov, gradients), **close)
    np.testing.assert_array_equal(path(last, gradients), path(plain, gradients))
    chex.assert_trees_all_equal_structs(*(o.init(jnp.ones(3)) for o in (late, last, plain)))
    late, _ = staleness.spike_compensation(schedule, 0, K=2)
    np.testing.assert_array_equal(path(late, gradients), path(optax.sgd(schedule), gradients))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("M", [1, 4])
def test_nadam_is_that_of_pytorch_line_by_line(gradients, M):
    K, b2, eps, rate, decay, psi = 4, 0.99, 1e-8, 0.1, 0.3, 0.5
    optimizers = staleness.nadam(rate, K, M, b2=b2, weight_decay=decay, momentum_decay=psi)
    for k, optimizer in enumerate(optimizers, start=1):
        b1 = 0.9 + 0.09 * (K - k) / (M * K)
        w, m, v, product, naive = np.ones(3), 0.0, 0.0, 1.0, [np.ones(3)]
        for t, g in enumerate(gradients, start=1):
            w = w * (1 - rate * decay)
            mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (t * psi)) for t in (t, t + 1))
            product *= mu
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            root = np.sqrt(v / (1 - b2**t)) + eps
            w = w - rate * (1 - mu) / (1 - product) * g / root - rate * mu_next / (1 - product * mu_next) * m / root
            naive.append(w)
        np.testing.assert_allclose(path(optimizer, gradients, jnp.ones(3)), naive, **close)


def test_nadam_without_momentum_decay_is_that_of_optax(gradients):
    optimizers = staleness.nadam(0.1, 3, late_b1=0.9, weight_decay=0.1, momentum_decay=None)
    plain = path(optax.nadamw(0.1, weight_decay=0.1), gradients, jnp.ones(3))
    for optimizer in optimizers:
        np.testing.assert_array_equal(path(optimizer, gradients, jnp.ones(3)), plain)
    late, *_ = staleness.nadam(0.1, 3, momentum_decay=None)
    np.testing.assert_allclose(path(late, gradients), path(optax.nadam(0.1, b1=0.96), gradients), rtol=1e-5)


SHAPES = (
    {"Embed_0": {"embedding": (7, 4)}},
    {"query": {"kernel": (4, 2, 3), "bias": (2, 3)}, "out": {"kernel": (2, 3, 4), "bias": (4,)}},
    {"conv": {"kernel": (3, 3, 4, 2)}, "scale": (4,)},
    (),
    {"Dense_0": {"kernel": (4, 7), "bias": (7,)}},
    {},
)
# kernels of more than two axes, and the matrices that they are
MATRICES = {(4, 2, 3): (4, 6), (2, 3, 4): (6, 4), (3, 3, 4, 2): (36, 2)}


@pytest.fixture
def network(x64):
    """``(params, gradients)``: a chain of six layers, of which two have no weights."""
    rng = np.random.default_rng(0)
    is_shape = lambda node: isinstance(node, tuple) and node != () and all(isinstance(n, int) for n in node)
    return tuple(
        jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape)), SHAPES, is_leaf=is_shape) for _ in range(2)
    )


def orthogonalized(g):
    """Five Newton-Schulz iterations, as in Jordan et al."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * x @ x.T + 2.0315 * x @ x.T @ x @ x.T) @ x
    return x


@pytest.mark.parametrize("stage", ["first", "last"])
def test_muon_takes_matrices_and_adam_the_rest(network, stage):
    """The first update: both kinds of momentum are then in proportion to the gradient."""
    params, gradients = network
    optimizer = dict(zip(("first", "last"), staleness.muon(0.1, 2, weight_decay=0.3), strict=True))[stage]
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    by_muon = {**MATRICES, (4, 7): (4, 7)} if stage == "first" else MATRICES
    for u, w, g in zip(*map(jax.tree.leaves, (updates, params, gradients)), strict=True):
        if w.shape in by_muon:
            w, g = (np.reshape(x, by_muon[w.shape]) for x in (w, g))
            expected = -0.1 * (0.2 * np.sqrt(max(g.shape)) * orthogonalized(g) + 0.3 * w)
        else:
            expected = -0.1 * (1 + 0.9 / 1.9) * np.sign(g)  # Nesterov's momentum, without bias
        np.testing.assert_allclose(u, np.reshape(expected, u.shape), rtol=1e-5)


def test_muon_can_have_the_output_layer_and_what_adam_takes_can_be_named(network):
    params, _ = network

    def matrices(optimizer):
        return sorted(w.shape for w in jax.tree.leaves(optimizer.init(params).inner_states["muon"]) if w.ndim > 1)

    (everything,) = staleness.muon(0.1, 1, output_layer_by_adam=False, by_adam=lambda name, weight: False)
    assert matrices(everything) == sorted([(7, 4), (4, 7), *MATRICES])
    (named,) = staleness.muon(0.1, 1, by_adam=lambda name, weight: "'conv'" in name or 7 in weight.shape)
    assert matrices(named) == [(2, 3, 4), (4, 2, 3)]


def test_of_plain_matrices_muon_is_that_of_optax(gradients):
    a, _ = staleness.muon(0.1, 2, beta=0.9, consistent_rms=None)
    b = optax.contrib.muon(0.1, beta=0.9)
    matrices = np.asarray(gradients, np.float32).reshape(1, 9, 3)
    np.testing.assert_array_equal(path(a, matrices), path(b, matrices))


def test_muon_trains_a_cut_network(naive, make_batches, run):
    stages = fr.partition([fr.from_linen(nn.Dense(n)) for n in (4, 2)], (1,))
    algorithm = fr.features_replay(stages, naive.squared_error, staleness.muon(0.1, 2))
    states, infos = run(algorithm, make_batches(1) * 12)
    assert float(infos[-1].loss) < 0.5 * float(infos[0].loss)
    by_muon = [len(jax.tree.leaves(state.inner_states["muon"].inner_state[0].mu)) for state in states[-1].opt_state]
    assert by_muon == [1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: staleness.spike_compensation(0.1, 1, 2), "momentum = 1 was given; it must be below 1"),
        (lambda: staleness.spike_compensation(0.1, -0.5, 2), r"momentum = -0\.5"),
        (lambda: staleness.spike_compensation(0.1, 0.9, 0), "K = 0"),
        (lambda: staleness.spike_compensation(0.1, 0.9, 2, 0), "microbatches = 0"),
        (lambda: staleness.nadam(0.1, 2, b1=1.5), r"b1 = 1\.5 was given; it must be a number, 0 to 1"),
        (lambda: staleness.nadam(0.1, 2, late_b1=-1), "late_b1 = -1"),
        (lambda: staleness.nadam(0.1, 2, weight_decay=-1), "weight_decay = -1"),
        (lambda: staleness.nadam(0.1, 2, momentum_decay=-1), "momentum_decay = -1"),
        (lambda: staleness.nadam(0.1, 0), "K = 0"),
        (lambda: staleness.nadam(0.1, 2, 0), "microbatches = 0"),
        (lambda: staleness.muon(0.1, 0), "K = 0"),
        (lambda: staleness.muon(0.1, 1)[0].init({"kernel": jnp.ones((2, 2))}), "cannot find the output layer"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
