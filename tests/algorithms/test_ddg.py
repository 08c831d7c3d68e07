import chex
import jax
import numpy as np
import optax
import pytest

import fr_jax as fr

STEPS = 12
close = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture
def check(naive, make_batches, run):
    """Runs DDG and the naive loop side by side, and compares everything but the residuals."""

    def check(modules, optimizers, weight_prediction=0.0):
        K = len(modules)
        ours, theirs = zip(*(naive.OPTIMIZERS[name] for name in optimizers), strict=True)
        stages = [naive.stage(module) for module in modules]
        optimizer = [make() for make in ours] if len(ours) > 1 else ours[0]()
        batches = make_batches(STEPS)
        ddg = fr.ddg(stages, naive.squared_error, optimizer, weight_prediction=weight_prediction, return_grads=True)
        states, infos = run(ddg, batches)
        updates = [make() for make in (theirs if len(theirs) > 1 else theirs * K)]
        naive_run = naive.ddg(modules, updates, states[0], batches, weight_prediction)
        for t, (state, info) in enumerate(zip(states[1:], infos, strict=True), start=1):
            chex.assert_trees_all_close(state.params, tuple(w[t] for w in naive_run.w), **close)
            chex.assert_trees_all_close(state.model_state, tuple(s[t] for s in naive_run.state), **close)
            chex.assert_trees_all_close(info.grads, tuple(g[t - 1] for g in naive_run.grads), **close)
            np.testing.assert_allclose(info.loss, naive_run.loss[t - 1], **close)
            for k in range(1, K):
                if t in naive_run.delta[k - 1]:
                    np.testing.assert_allclose(state.deltas[k - 1], naive_run.delta[k - 1][t], **close)
        return states, infos

    return check


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "optimizer"),
    [
        *((K, "sgd") for K in (1, 2, 3, 4, 5)),
        *((3, name) for name in ("nesterov", "adam")),
        *(pytest.param(K, name, marks=pytest.mark.slow) for K in (1, 2, 4, 5) for name in ("nesterov", "adam")),
    ],
)
def test_trajectory_equals_the_equations(naive, check, K, optimizer):
    modules = [(naive.dense(4), naive.dense(5)) if k % 2 else (naive.dense(5),) for k in range(K - 1)]
    check([*modules, (naive.dense(2),)], [optimizer])


@pytest.mark.usefixtures("x64")
def test_every_module_may_have_its_own_optimizer(naive, check):
    modules = [(naive.dense(5),), (naive.dense(4), naive.dense(4)), (naive.dense(4),), (naive.dense(2),)]
    check(modules, ["adam", "decaying", "nesterov", "sgd"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strength", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_forward_may_use_predicted_weights(naive, check, strength):
    check([(naive.dense(5), naive.batch_norm()), (naive.dense(4),), (naive.dense(2),)], ["nesterov"], strength)


@pytest.mark.usefixtures("x64")
def test_dropout_and_running_statistics(naive, check):
    inner = (naive.dense(4), naive.batch_norm(), naive.dropout(0.3))
    states, _ = check([inner, (naive.dropout(0.2),), inner, (naive.batch_norm(), naive.dense(2))], ["nesterov"])
    for k, place in ((0, 1), (2, 1), (3, 0)):  # they move in the one forward pass, from the first step on
        means = [state.model_state[k][place]["mean"] for state in states]
        assert not any(np.array_equal(a, b) for a, b in zip(means, means[1:], strict=False))


@pytest.mark.usefixtures("x64")
def test_gradient_is_that_of_backprop_at_the_old_weights(naive, make_batches, run):
    """Oracle 3, against back-propagation itself: one step of it from the snapshot w^s on mini-batch s."""
    K = 4
    stages = [naive.stage((naive.dense(4), naive.dropout(0.3)))] + [naive.dense(4).stage] * 2 + [naive.dense(2).stage]
    batches = make_batches(STEPS)
    states, infos = run(fr.ddg(stages, naive.squared_error, optax.adam(0.1), return_grads=True), batches)
    plain = fr.backprop(stages, naive.squared_error, optax.sgd(0.0), return_grads=True)
    start = plain.init(jax.random.key(1), batches[0])
    snapshots = []
    for s, batch in enumerate(batches):
        _, info = plain.step(start._replace(params=states[s].params, streams=states[s].streams), batch)
        snapshots.append(info.grads)
    for t, info in enumerate(infos):
        for k in range(1, K + 1):
            s = t + k - K
            if s < 0:
                assert info.grads[k - 1] is None
                chex.assert_trees_all_equal(states[t].params[k - 1], states[t + 1].params[k - 1])
                chex.assert_trees_all_equal(states[t].opt_state[k - 1], states[t + 1].opt_state[k - 1])
            else:
                chex.assert_trees_all_close(info.grads[k - 1], snapshots[s][k - 1], **close)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "optimizer",
    [
        *(pytest.param(optax.sgd(0.1, momentum), marks=pytest.mark.slow) for momentum in (None, 0.9)),
        optax.adam(0.01),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_one_module_equals_backprop(naive, make_batches, run, optimizer):
    stage = naive.stage((naive.dense(4), naive.batch_norm(), naive.dropout(0.5), naive.dense(2)))
    decoupled, _ = run(fr.ddg([stage], naive.squared_error, optimizer), make_batches(STEPS))
    plain, _ = run(fr.backprop([stage], naive.squared_error, optimizer), make_batches(STEPS))
    for a, b in zip(decoupled, plain, strict=True):
        chex.assert_trees_all_equal((a.params, a.model_state, a.opt_state), (b.params, b.model_state, b.opt_state))


@pytest.mark.parametrize("placement", [pytest.param(None, marks=pytest.mark.slow), "split"])
def test_a_state_has_one_structure_from_first_to_last(naive, make_batches, run, placement):
    """So that a checkpoint of any step fits a fresh state, and nothing is compiled again after it was read."""
    K = 3
    inner = naive.stage((naive.dense(4), naive.batch_norm(), naive.dropout(0.3)))
    shardings = placement and fr.placement(K, jax.devices()[: 2 * K], data_parallel=2)
    algorithm = fr.ddg([inner] * 2 + [naive.dense(2).stage], naive.squared_error, optax.adam(0.1), placement=shardings)
    states, _ = run(algorithm, make_batches(6))
    for t, state in enumerate(states):
        assert state.step == t
        assert [len(history.entries) for history in state.history] == [K - k for k in range(1, K)]
        assert jax.tree.structure(state._replace(step=0)) == jax.tree.structure(states[0])
        for leaf, first in zip(*map(jax.tree.leaves, (state.history, states[0].history)), strict=True):
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (first.shape, first.dtype, first.sharding)


def test_residuals_are_the_only_copies_of_a_batch_that_are_kept(naive, make_batches, run):
    """No entry outlives its use: module k < K holds K-k of them, and each leaf of an applied one is free to go."""
    K = 3
    stages = [naive.dense(4).stage, naive.dense(4).stage, naive.dense(2).stage]
    algorithm = fr.ddg(stages, naive.squared_error, optax.sgd(0.1), donate=True)
    batches = make_batches(12)
    state = algorithm.init(jax.random.key(1), batches[0])
    live = []
    for batch in batches:
        state, _ = algorithm.step(state, batch)
        jax.block_until_ready(state.params)
        live.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(set(live[K:])) == 1
