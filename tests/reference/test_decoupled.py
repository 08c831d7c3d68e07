"""The literal loops against each other, and against the library."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.reference import decoupled
from fr_jax.reference.stages import init_layers, mean_squared_error, relu_stage, sgd_update

STEPS = 9
RATE = 0.05
METHODS = {
    "backpropagation": (decoupled.backpropagation, fr.backprop),
    "features replay": (decoupled.features_replay, fr.features_replay),
    "DDG": (decoupled.ddg, fr.ddg),
}
close = {"rtol": 1e-11, "atol": 1e-13}


def network(K):
    """K stages of 1 or 2 layers, and the weights of each."""
    depths = [2 if k % 2 else 1 for k in range(K)]
    layers = init_layers(np.random.default_rng(3), (4, *[6] * (sum(depths) - 1), 2))
    ends = np.cumsum(depths)
    w = [layers[end - depth : end] for end, depth in zip(ends, depths, strict=True)]
    return [relu_stage(depth, linear_output=k == K - 1) for k, depth in enumerate(depths)], w


def batches(steps=STEPS):
    rng = np.random.default_rng(4)
    return [(rng.standard_normal((5, 4)), rng.standard_normal((5, 2))) for _ in range(steps)]


def momentum_update(rate, momentum=0.9):
    velocity = None

    def update(w, g):
        nonlocal velocity
        velocity = g if velocity is None else jax.tree.map(lambda v, g: momentum * v + g, velocity, g)
        return jax.tree.map(lambda w, v: w - rate * v, w, velocity)

    return update


def twin(w, linear_output):
    """The library's twin of a ReLU stage, starting at ``w``."""

    def apply(params, state, x, *, key=None, train=True):
        for j, (W, b) in enumerate(params):
            x = x @ W.T + b[None]
            x = x if linear_output and j == len(params) - 1 else jax.nn.relu(x)
        return x, state

    return fr.Stage(lambda key, x: (jax.tree.map(jnp.asarray, w), ()), apply)


def loss_fn(outputs, targets):
    return ((outputs - targets) ** 2).sum(-1).mean()


def run(method, K, update=lambda: sgd_update(RATE), steps=STEPS):
    stages, w = network(K)
    return METHODS[method][0](stages, [update() for _ in w], mean_squared_error, w, batches(steps))


OPTIMIZERS = {
    "sgd": (lambda: sgd_update(RATE), lambda: optax.sgd(RATE)),
    "momentum": (lambda: momentum_update(RATE), lambda: optax.sgd(RATE, momentum=0.9)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("K", "optimizer"), [(1, "sgd"), (2, "sgd"), (3, "sgd"), (4, "sgd"), (3, "momentum")])
def test_trajectory_equals_the_librarys(method, K, optimizer):
    _, w = network(K)
    stages = [twin(w_k, linear_output=k == K - 1) for k, w_k in enumerate(w)]
    update, make_optimizer = OPTIMIZERS[optimizer]
    algorithm = METHODS[method][1](stages, loss_fn, make_optimizer(), return_grads=True)
    literal = run(method, K, update)
    data = [fr.Batch(*(jnp.asarray(array) for array in batch)) for batch in batches()]
    state = algorithm.init(jax.random.key(0), data[0])
    for t, batch in enumerate(data):
        chex.assert_trees_all_close(state.params, tuple(w_k[t] for w_k in literal.w), **close)
        state, info = algorithm.step(state, batch)
        np.testing.assert_allclose(info.loss, literal.loss[t], **close)
        chex.assert_trees_all_close(info.grads, tuple(grads[t] for grads in literal.grads), **close)
    chex.assert_trees_all_close(state.params, tuple(w_k[-1] for w_k in literal.w), **close)


@pytest.mark.parametrize("method", ["features replay", "DDG"])
def test_one_stage_is_backpropagation(method):
    chex.assert_trees_all_equal(run(method, 1), run("backpropagation", 1))


@pytest.mark.parametrize("method", METHODS)
def test_trajectory_holds_everything_from_the_iteration_on_at_which_it_exists(method):
    K = 4
    trajectory = run(method, K)
    assert [len(w_k) for w_k in trajectory.w] == [STEPS + 1] * K
    assert [len(h_k) for h_k in trajectory.h] == [STEPS] * (K + 1)
    assert len(trajectory.loss) == STEPS
    for k in range(1, K + 1):
        first = 0 if method == "backpropagation" else K - k
        for entries in (trajectory.delta[k - 1], trajectory.grads[k - 1]):
            assert [entry is not None for entry in entries] == [t >= first for t in range(STEPS)]
        for t in range(STEPS):
            old, new = trajectory.w[k - 1][t : t + 2]
            assert (old is new) == (t < first)
    for t, (x, _) in enumerate(batches()):
        np.testing.assert_array_equal(trajectory.h[0][t], x)


@pytest.mark.parametrize("method", ["features replay", "DDG"])
def test_with_zero_step_size_gradients_are_those_of_backpropagation_later(method):
    K = 4
    late, plain = (run(name, K, lambda: sgd_update(0.0)) for name in (method, "backpropagation"))
    for k in range(1, K + 1):
        for t in range(K - k, STEPS):
            chex.assert_trees_all_close(late.grads[k - 1][t], plain.grads[k - 1][t + k - K], **close)


def test_ddg_applies_the_backpropagation_gradient_at_the_snapshot():
    """The gradient applied at t by stage k is that of back-propagation at w^{t+k-K} on mini-batch t + k - K."""
    K = 4
    stages, _ = network(K)
    trajectory = run("DDG", K)
    for s in range(STEPS - K):
        # Stage j's weights when it differentiated mini-batch s were w_j^s, for every j.
        snapshot = [w_k[s] for w_k in trajectory.w]
        one = decoupled.backpropagation(
            stages, [sgd_update(0.0)] * K, mean_squared_error, snapshot, batches()[s : s + 1]
        )
        for k in range(1, K + 1):
            chex.assert_trees_all_close(trajectory.grads[k - 1][s + K - k], one.grads[k - 1][0], **close)


def test_features_replay_and_ddg_differ_once_weights_have_moved():
    replay, ddg = run("features replay", 3), run("DDG", 3)
    chex.assert_trees_all_equal([w_k[2] for w_k in replay.w], [w_k[2] for w_k in ddg.w])
    differences = [np.abs(replay.grads[0][t][0][0] - ddg.grads[0][t][0][0]).max() for t in range(2, STEPS)]
    assert all(difference > 1e-6 for difference in differences[1:]), differences


@pytest.mark.parametrize("method", ["features replay", "DDG"])
def test_replay_sees_the_number_of_its_minibatch(method):
    """A mask that depends on s: the gradients at zero step size are those of back-propagation with the same masks."""
    K = 3
    stages, w = network(K)

    def masked(stage):
        def forward(w, h, s):
            y, pull = stage(w, h, s)
            mask = np.random.default_rng(s).integers(0, 2, y.shape) * 2.0
            return y * mask, lambda dy: pull(dy * mask)

        return forward

    stages = [masked(stage) for stage in stages]
    updates = [sgd_update(0.0)] * K
    late, plain = (
        METHODS[name][0](stages, updates, mean_squared_error, w, batches()) for name in (method, "backpropagation")
    )
    for k in range(1, K + 1):
        for t in range(K - k, STEPS):
            chex.assert_trees_all_close(late.grads[k - 1][t], plain.grads[k - 1][t + k - K], **close)


@pytest.mark.parametrize("method", METHODS)
def test_learns(method):
    stages, w = network(3)
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4, 2))
    data = [(x, x @ mixing) for x in rng.uniform(-1, 1, (300, 16, 4))]
    losses = METHODS[method][0](stages, [sgd_update(0.1)] * 3, mean_squared_error, w, data).loss
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])


@pytest.mark.parametrize("method", METHODS)
def test_no_batches_give_an_empty_trajectory(method):
    trajectory = run(method, 2, steps=0)
    assert trajectory.loss == [] and [len(w_k) for w_k in trajectory.w] == [1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_refused(method):
    stages, w = network(2)
    with pytest.raises(ValueError, match="2 stages, 1 updates and 2 weights"):
        METHODS[method][0](stages, [sgd_update(0.1)], mean_squared_error, w, [])
    with pytest.raises(ValueError, match="0 stages"):
        METHODS[method][0]([], [], mean_squared_error, [], [])
