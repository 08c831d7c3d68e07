import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import fr_jax as fr
from fr_jax.algorithms import admm as parts

close = {"rtol": 1e-9, "atol": 1e-10}
SIZES = (3, 5, 4, 2)
OWN = parts.Penalties(1.5, 4.0, 2, SIZES)
N = 12


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return fr.Batch(jnp.asarray(rng.standard_normal((N, 3))), jnp.asarray(rng.integers(0, 2, N), jnp.int32))


def relu(z):
    return np.maximum(z, 0)


def affine(w, a):
    return a @ w["kernel"] + w["bias"]


def hinge(z, y):
    return np.where(y == 1, relu(1 - z), relu(z))


def lagrangian(w, z, a, multiplier, y, beta=OWN.beta, gamma=OWN.gamma):
    """The augmented Lagrangian; ``a`` begins with the inputs."""
    value = hinge(z[-1], y).sum() + (z[-1] * multiplier).sum()
    value += beta * sum(((out - affine(layer, below)) ** 2).sum() for layer, out, below in zip(w, z, a, strict=True))
    return value + gamma * sum(((b - relu(out)) ** 2).sum() for out, b in zip(z, a[1:], strict=False))


def weights(a, z):
    extended = parts.with_ones(jnp.asarray(a))
    return parts.solve_weights(extended, parts.gram_inverse(extended), jnp.asarray(z))


def naive_iteration(w, z, multiplier, x, y, dual, beta=OWN.beta, gamma=OWN.gamma):
    """Algorithm 1 with NumPy's least squares, and entries of z one by one."""
    w, z, L, a = list(w), list(z), len(w), [x] + [None] * (len(w) - 1)
    for k in range(L):
        extended = np.concatenate([a[k], np.ones((len(x), 1))], axis=1)
        W = np.linalg.lstsq(extended, z[k], rcond=None)[0]
        w[k] = {"kernel": W[:-1], "bias": W[-1]}
        if k < L - 1:
            above = w[k + 1]["kernel"]
            matrix = beta * above @ above.T + gamma * np.eye(len(above))
            a[k + 1] = (beta * (z[k + 1] - w[k + 1]["bias"]) @ above.T + gamma * relu(z[k])) @ np.linalg.inv(matrix)
            m = affine(w[k], a[k])
            z[k] = np.vectorize(lambda a, m: best_output(a, m, beta, gamma))(a[k + 1], m)
    m = affine(w[-1], a[-1])
    z[-1] = np.vectorize(lambda y, u, m: best_last(y, u, m, beta))(y, multiplier, m)
    return w, z, a, multiplier + beta * (z[-1] - m) if dual else multiplier


def best_output(a, m, beta, gamma):
    cost = lambda z: gamma * (a - max(z, 0)) ** 2 + beta * (z - m) ** 2
    return min((min(m, 0), max((gamma * a + beta * m) / (gamma + beta), 0)), key=cost)


def best_last(y, u, m, beta):
    cost = lambda z: float(hinge(z, y)) + u * z + beta * (z - m) ** 2
    return min((y, m - u / (2 * beta), m - (u + (-1 if y else 1)) / (2 * beta)), key=cost)


@pytest.mark.usefixtures("x64")
def test_trajectory_equals_the_algorithm(batch, run):
    """Five iterations, the multiplier from the third on; the terms add up to the Lagrangian."""
    fit = fr.admm(SIZES, beta=OWN.beta, gamma=OWN.gamma, warm_start=OWN.warm_start)
    states, infos = run(fit, [batch] * 5)
    w, z, u = jax.tree.map(np.asarray, (states[0].params[0], states[0].z, states[0].multiplier))
    x, y = np.asarray(batch.inputs), np.eye(2)[np.asarray(batch.targets)]
    assert abs(z[0].mean()) < 0.3 and 0.7 < z[0].std() < 1.3 and not u.any()
    for t, (state, info) in enumerate(zip(states[1:], infos, strict=True)):
        w, z, a, u = naive_iteration(w, z, u, x, y, dual=t >= 2)
        chex.assert_trees_all_close((state.params[0], state.z), (tuple(w), tuple(z)), **close)
        np.testing.assert_allclose(state.multiplier, u, **close)
        total = sum(float(term) for name, term in info.metrics.items())
        np.testing.assert_allclose(total * N, lagrangian(w, z, a, u, y), **close)
        out = x
        for k, layer in enumerate(w):
            out = affine(layer, relu(out) if k else out)
        np.testing.assert_allclose(info.loss, hinge(out, y).sum() / N, **close)
        np.testing.assert_allclose(fit.predict(state, batch.inputs), out, **close)
    assert u.any() and infos[0].grads is None


@pytest.mark.usefixtures("x64")
def test_each_update_minimises_its_term():
    """Against BFGS for weights and activations, and a fine grid for each entry of the outputs."""
    rng = np.random.default_rng(1)
    a, z, above = rng.standard_normal((N, 3)), rng.standard_normal((N, 4)), rng.standard_normal((N, 2))
    W = {"kernel": rng.standard_normal((4, 2)), "bias": rng.standard_normal(2)}

    def found(f, shape):
        return scipy.optimize.minimize(lambda v: f(v.reshape(shape)), np.zeros(np.prod(shape)), tol=1e-12).x.reshape(
            shape
        )

    layer = weights(a, z)
    best = found(lambda W: ((z - np.c_[a, np.ones(N)] @ W) ** 2).sum(), (4, 4))
    np.testing.assert_allclose(np.vstack([layer["kernel"], layer["bias"]]), best, atol=1e-5)

    one = slice(0, 1)  # an example has its own minimum
    cost = lambda a: OWN.gamma * ((a - relu(z[one])) ** 2).sum() + OWN.beta * ((above[one] - affine(W, a)) ** 2).sum()
    solved = parts.solve_activations(OWN, jax.tree.map(jnp.asarray, W), *map(jnp.asarray, (above, z)))
    np.testing.assert_allclose(solved[one], found(cost, (1, 4)), atol=1e-5)

    grid = np.linspace(-6, 6, 120_001)
    for m, b in rng.uniform(-2, 2, (40, 2)):
        values = OWN.gamma * (b - relu(grid)) ** 2 + OWN.beta * (grid - m) ** 2
        chosen = float(parts.solve_outputs(OWN, jnp.array(b), jnp.array(m)))
        assert OWN.gamma * (b - relu(chosen)) ** 2 + OWN.beta * (chosen - m) ** 2 <= values.min() + 1e-8
        for y in (0.0, 1.0):
            values = hinge(grid, y) + b * grid + OWN.beta * (grid - m) ** 2
            chosen = float(parts.solve_last_outputs(OWN, jnp.array(y), jnp.array(b), jnp.array(m)))
            assert abs(chosen - grid[values.argmin()]) < 2e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [3, 20], ids=["tall", "wide"])
def test_a_singular_problem_has_the_solution_of_least_norm(n):
    """Pixels that are always black, a copy of another column, and more pixels than examples."""
    rng = np.random.default_rng(2)
    a, z = rng.standard_normal((N, n)), rng.standard_normal((N, 2))
    a = np.concatenate([a, np.zeros((N, 1)), a[:, :1]], axis=1)
    layer = weights(a, z)
    expected = np.linalg.pinv(np.c_[a, np.ones(N)]) @ z
    np.testing.assert_allclose(np.vstack([layer["kernel"], layer["bias"]]), expected, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_the_order_of_the_examples_does_not_matter_with_an_index(batch, run):
    plain, _ = run(fr.admm(SIZES), [batch] * 4)
    rng, shuffled = np.random.default_rng(3), []
    for _ in range(4):
        order = rng.permutation(N).astype(np.int32)
        shuffled.append(fr.Batch(batch.inputs[order], batch.targets[order], jnp.asarray(order)))
    other, _ = run(fr.admm(SIZES), shuffled)
    chex.assert_trees_all_close(other[-1]._replace(streams=()), plain[-1]._replace(streams=()), **close)


@pytest.mark.usefixtures("x64")
def test_devices_and_donation_change_no_number_and_nothing_recompiles(batch, run, compilations):
    plain, _ = run(fr.admm(SIZES, warm_start=1), [batch] * 4)
    placement = fr.placement(1, jax.devices()[:2], data_parallel=2)
    split = fr.admm(SIZES, warm_start=1, placement=placement, donate=True)
    state = split.init(jax.random.key(1), batch)
    for t in range(4):
        old, (state, _) = state, split.step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params[0][1:], old.z, old.multiplier)))
        chex.assert_trees_all_close((state.params, state.z), (plain[t + 1].params, plain[t + 1].z), **close)
        assert {leaf.sharding for leaf in (*state.z, state.multiplier)} == set(placement)
        if t == 0:
            compilations.clear()
    assert not [name for name in compilations if "solve" in name]


def test_a_state_is_still_good_after_its_step(batch):
    fit = fr.admm(SIZES)
    state = fit.init(jax.random.key(1), batch)
    first, second = (fit.step(state, batch) for _ in range(2))
    without_keys = lambda state: state._replace(streams=())
    chex.assert_trees_all_equal((without_keys(first[0]), first[1]), (without_keys(second[0]), second[1]))
    copy = fr.backprop([parts.dense_network(SIZES, jax.nn.relu)], parts.mean_hinge, optax.sgd(0.1))
    chex.assert_trees_all_equal(copy.init(jax.random.key(0), batch, first[0].params).params, first[0].params)


def test_it_learns_labels(run):
    """Two halves of a plane, in single precision, with one output."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 2)).astype(np.float32)
    labels = (inputs @ np.array([1.0, -2.0]) > 0).astype(np.int32)
    accuracy = lambda out, y: {"accuracy": ((out[:, 0] > 0.5) == y).mean()}
    _, infos = run(fr.admm((2, 8, 1), metrics_fn=accuracy), [fr.Batch(inputs, labels)] * 15)
    assert infos[-1].metrics["accuracy"] > 0.9 and infos[-1].loss < infos[0].loss


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"layer_sizes": [3]}, r"layer_sizes = \[3\] was given; admm trains dense networks only"),
        ({"layer_sizes": fr.models.MODELS["resnet8"]()}, "admm trains dense networks only, and makes them itself"),
        ({"beta": 0}, "beta = 0 was given; it must be a finite number above 0"),
        ({"gamma": float("nan")}, "gamma = nan was given"),
        ({"warm_start": -1}, "warm_start = -1 was given; it must be a whole number, at least 0"),
        ({"placement": fr.placement(2)}, "placement has 2 entries for K = 1 stages"),
    ],
)
def test_wrong_arguments_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        fr.admm(**{"layer_sizes": SIZES} | arguments)


def test_what_a_state_was_not_made_for_is_refused(batch):
    fit = fr.admm(SIZES)
    state = fit.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="Features in flight have those shapes"):
        fit.step(state, fr.Batch(batch.inputs[:6], batch.targets[:6]))
    with pytest.raises(ValueError, match=r"cannot start from given ones. Leave params out of init\(\)"):
        fit.init(jax.random.key(0), batch, state.params)
