import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import features_replay
from fr_jax.algorithms._validation import check_setup

STEPS = 12
close = {"rtol": 1e-11, "atol": 1e-12}


def assert_same_run(states, infos, naive_run, K):
    """Parameters, model state, gradients, loss, and what is in flight, after every step."""
    for t, (state, info) in enumerate(zip(states[1:], infos, strict=True), start=1):
        chex.assert_trees_all_close(state.params, tuple(w[t] for w in naive_run.w), **close)
        chex.assert_trees_all_close(state.model_state, tuple(s[t] for s in naive_run.state), **close)
        chex.assert_trees_all_close(info.grads, tuple(g[t - 1] for g in naive_run.grads), **close)
        np.testing.assert_allclose(info.loss, naive_run.loss[t - 1], **close)
        for k in range(1, K):
            h = naive_run.h[k - 1]
            in_flight = [h[s] if s >= 0 else np.zeros_like(h[0]) for s in range(t - (K - k), t)]
            chex.assert_trees_all_close(state.history[k - 1].entries, tuple(in_flight), **close)
            if t in naive_run.delta[k - 1]:
                np.testing.assert_allclose(state.deltas[k - 1], naive_run.delta[k - 1][t], **close)


@pytest.fixture
def check(naive, make_batches, run):
    """Runs features replay and the naive loop side by side."""

    def check(modules, optimizers, batch_stats="play"):
        ours, theirs = zip(*(naive.OPTIMIZERS[name] for name in optimizers), strict=True)
        stages = [naive.stage(module) for module in modules]
        algorithm = fr.features_replay(
            stages,
            naive.squared_error,
            [make() for make in ours] if len(ours) > 1 else ours[0](),
            batch_stats=batch_stats,
            return_grads=True,
        )
        batches = make_batches(STEPS)
        states, infos = run(algorithm, batches)
        K = len(modules)
        updates = [make() for make in (theirs if len(theirs) > 1 else theirs * K)]
        naive_run = naive.features_replay(modules, updates, states[0], batches, batch_stats)
        assert_same_run(states, infos, naive_run, K)
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
def test_trajectory_equals_algorithm_1(naive, check, K, optimizer):
    modules = [(naive.dense(4), naive.dense(5)) if k % 2 else (naive.dense(5),) for k in range(K - 1)]
    check([*modules, (naive.dense(2),)], [optimizer])


@pytest.mark.usefixtures("x64")
def test_every_module_may_have_its_own_optimizer(naive, check):
    modules = [(naive.dense(5),), (naive.dense(4), naive.dense(4)), (naive.dense(4),), (naive.dense(2),)]
    check(modules, ["adam", "decaying", "nesterov", "sgd"])


@pytest.mark.usefixtures("x64")
def test_replay_uses_the_dropout_mask_of_play(naive, check):
    noisy = (naive.dense(8), naive.dropout(0.5), naive.dense(8), naive.dropout(0.3))
    check([(naive.dropout(0.2),), noisy, (naive.dense(2), naive.dropout(0.1))], ["sgd"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch_stats", ["play", "replay", "both"])
def test_running_statistics_follow_the_policy(naive, check, batch_stats):
    inner = (naive.dense(4), naive.batch_norm())
    modules = [inner, inner, inner, (naive.batch_norm(), naive.dense(2))]
    K = len(modules)
    states, _ = check(modules, ["nesterov"], batch_stats)
    for k in range(1, K + 1):
        moved = [
            not np.array_equal(*(s.model_state[k - 1][k < K]["mean"] for s in states[t : t + 2])) for t in range(K)
        ]
        first_replay = K - k if batch_stats == "replay" else 0
        assert moved == [t >= first_replay for t in range(K)]


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
    decoupled, _ = run(fr.features_replay([stage], naive.squared_error, optimizer), make_batches(STEPS))
    plain, _ = run(fr.backprop([stage], naive.squared_error, optimizer), make_batches(STEPS))
    for a, b in zip(decoupled, plain, strict=True):
        chex.assert_trees_all_equal((a.params, a.model_state, a.opt_state), (b.params, b.model_state, b.opt_state))


@pytest.mark.usefixtures("x64")
def test_with_zero_step_size_gradients_are_those_of_backprop(naive, make_batches, run):
    K = 4
    stages = [naive.stage((naive.dense(4), naive.dropout(0.3)))] + [naive.dense(4).stage] * 2 + [naive.dense(2).stage]
    batches = make_batches(STEPS)
    _, decoupled = run(fr.features_replay(stages, naive.squared_error, optax.sgd(0.0), return_grads=True), batches)
    _, plain = run(fr.backprop(stages, naive.squared_error, optax.sgd(0.0), return_grads=True), batches)
    for t, info in enumerate(decoupled):
        for k in range(1, K + 1):
            s = t + k - K
            if s < 0:
                assert info.grads[k - 1] is None
            else:
                chex.assert_trees_all_close(info.grads[k - 1], plain[s].grads[k - 1], **close)
    different = [float(jnp.abs(info.grads[0][0]["W"]).sum()) for info in plain]
    assert len(set(different)) == STEPS


def test_history_holds_the_features_in_flight(naive, make_batches, run):
    K = 4
    stages = [naive.dense(3).stage for _ in range(K - 1)] + [naive.dense(2).stage]
    states, _ = run(fr.features_replay(stages, naive.squared_error, optax.sgd(0.1)), make_batches(3))
    for t, state in enumerate(states):
        assert state.step == t
        assert [len(history.entries) for history in state.history] == [K - k for k in range(1, K)]
        assert jax.tree.structure(state._replace(step=0)) == jax.tree.structure(states[0])


def test_modules_that_did_not_update_report_no_gradient(naive, make_batches, run):
    stages = [naive.dense(3).stage, naive.dense(3).stage, naive.dense(2).stage]
    algorithm = fr.features_replay(
        stages,
        naive.squared_error,
        optax.adam(0.1),
        return_grads=True,
        metrics_fn=lambda outputs, targets: {"largest": jnp.abs(outputs).max()},
    )
    states, infos = run(algorithm, make_batches(4))
    for t, info in enumerate(infos):
        updated = [k for k in (1, 2, 3) if t + k - 3 >= 0]
        assert set(info.metrics) == {"largest", *(f"gradient_norm/{k}" for k in updated)}
        for k in (1, 2, 3):
            old, new = states[t].params[k - 1], states[t + 1].params[k - 1]
            if k in updated:
                np.testing.assert_allclose(
                    info.metrics[f"gradient_norm/{k}"], optax.tree.norm(info.grads[k - 1]), rtol=1e-6
                )
                assert not np.array_equal(old["W"], new["W"])
            else:
                assert info.grads[k - 1] is None
                chex.assert_trees_all_equal((old, states[t].opt_state[k - 1]), (new, states[t + 1].opt_state[k - 1]))
    assert run(fr.features_replay(stages, naive.squared_error, optax.sgd(0.1)), make_batches(1))[1][0].grads is None


@pytest.mark.parametrize("batch_stats", ["never", None])
def test_unknown_policy_is_refused(naive, batch_stats):
    with pytest.raises(ValueError, match="unknown; it can be 'play', 'replay' or 'both'"):
        fr.features_replay([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), batch_stats=batch_stats)


@pytest.mark.parametrize("batch_stats", ["play", "replay", "both"])
def test_only_what_has_changed_is_returned(naive, make_batches, batch_stats):
    """XLA would copy running statistics that a stage returns as it was given them, a kernel for each leaf."""
    stages = [naive.stage((naive.dense(4), naive.batch_norm())), naive.dense(2).stage]
    setup = check_setup(stages, naive.squared_error, optax.sgd(0.1))
    options = features_replay.Options(batch_stats=batch_stats)
    parts = features_replay.make_parts(options, setup)
    (batch,) = make_batches(1)
    state = features_replay.init(options, setup, parts, jax.random.key(0), batch, None, None)
    stage = state.params[0], state.model_state[0]
    _, moved, _ = parts.plays[0](*stage, state.streams[0], batch.inputs)
    assert (moved is None) == (batch_stats == "replay")
    updated = parts.replays[0](*stage, state.opt_state[0], state.streams[0], batch.inputs, state.deltas[0])
    assert (updated.model_state is None) == (batch_stats == "play")
