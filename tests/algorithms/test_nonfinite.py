"""Mini-batches that are not finite: their updates are dropped, in each stage, and nothing else."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

KEY = jax.random.key(0)
close = {"rtol": 1e-10, "atol": 1e-12}
BAD = 2


def dni(stages, loss_fn, optimizer, **options):
    apply = lambda w, s, h, *, key=None, train=True: (w * h, s)
    synthesizer = fr.Stage(lambda key, h: (jnp.ones((), h.dtype), ()), apply)
    return fr.dni(stages, loss_fn, optimizer, synthesizer, optax.adam(1e-3), **options)


gpipe = functools.partial(fr.gpipe, microbatches=2)
accumulating = functools.partial(fr.backprop, microbatches=2)
ON_TIME = {
    "bp": fr.backprop,
    "bp, M = 2": accumulating,
    "gpipe": gpipe,
    "clipped": functools.partial(fr.backprop, global_clip=0.3),
    "dni": dni,
    "blockprop": fr.blockprop,
    "dfa": fr.direct_feedback_alignment,
    "proxprop": fr.proximal_backprop,
}


@pytest.fixture
def stages(naive):
    layers = naive.dense(4), naive.batch_norm(), naive.dense(4), naive.batch_norm(), naive.dense(2)
    return fr.partition([layer.stage for layer in layers], (2, 4))


def spoilt(batches, where, value=np.nan):
    """One example of mini-batch BAD has an entry that is not finite."""
    batch = batches[BAD]._asdict()
    batch[where] = jnp.asarray(batch[where]).at[3, 1].set(value)
    return [*batches[:BAD], fr.Batch(**batch), *batches[BAD + 1 :]]


def skipped(info):
    return [int(value) for name, value in sorted(info.metrics.items()) if name.startswith("skipped/")]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "devices", "where"),
    [
        ("bp", 1, "targets"),
        ("bp", 3, "targets"),
        ("gpipe", 3, "targets"),
        ("clipped", 3, "inputs"),
        *(pytest.param(m, 1, "inputs", marks=pytest.mark.slow) for m in ON_TIME),
        *(pytest.param(m, 3, "targets", marks=pytest.mark.slow) for m in ("bp, M = 2", "clipped")),
    ],
)
def test_a_bad_mini_batch_is_as_if_it_had_not_been(naive, stages, make_batches, method, devices, where):
    algorithm = ON_TIME[method](
        stages,
        naive.squared_error,
        optax.adam(0.05),
        skip_nonfinite=True,
        donate=True,
        placement=fr.placement(3, jax.devices()[:devices]),
    )
    batches = make_batches(5)
    without, state = (algorithm.init(KEY, batches[0]) for _ in range(2))
    for t, batch in enumerate(spoilt(batches, where)):
        state, info = algorithm.step(state, batch)
        if t != BAD:
            without, expected = algorithm.step(without, batch)
            np.testing.assert_allclose(info.loss, expected.loss, **close)
            assert skipped(expected) == [0, 0, 0]
        assert skipped(info) == [int(t == BAD)] * 3
        for name in ("params", "model_state"):
            chex.assert_trees_all_close(getattr(state, name), getattr(without, name), **close)


def careful(update):
    return lambda w, g: update(w, g) if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g)) else w


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("where", ["inputs", pytest.param("targets", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "loop", "options"),
    [
        (fr.features_replay, "features_replay", {"batch_stats": "play"}),
        (fr.ddg, "ddg", {}),
    ],
)
def test_late_stages_drop_the_update_when_its_gradient_arrives(naive, make_batches, method, loop, options, where):
    modules = [(naive.dense(4),), (naive.dense(4),), (naive.dense(2),)]
    stages = [naive.stage(module) for module in modules]
    algorithm = method(stages, naive.squared_error, optax.sgd(0.1, 0.9, nesterov=True), skip_nonfinite=True)
    batches = spoilt(make_batches(7), where)
    state = start = algorithm.init(KEY, batches[0])
    updates = [careful(naive.nesterov(0.1, 0.9, 0.0)) for _ in modules]
    with np.errstate(invalid="ignore"):
        expected = getattr(naive, loop)(modules, updates, start, batches, **options)
    for t, batch in enumerate(batches, start=1):
        state, info = algorithm.step(state, batch)
        chex.assert_trees_all_close(state.params, tuple(w[t] for w in expected.w), **close)
        # Stage k meets mini-batch BAD K-k steps late; before its first gradient it reports nothing.
        assert skipped(info) == [int(t - 1 == BAD + 2 - k) for k in range(3) if t - 1 >= 2 - k]
    assert np.isfinite(info.loss)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "batch_stats", "M"),
    [
        (fr.features_replay, "play", 1),
        (fr.features_replay, "both", 2),
        (fr.pipedream_2bw, None, 4),
        *(
            pytest.param(fr.features_replay, stats, M, marks=pytest.mark.slow)
            for stats in ("play", "replay")
            for M in (2,)
        ),
        pytest.param(fr.ddg, None, 2, marks=pytest.mark.slow),
    ],
)
def test_statistics_stay_finite(naive, stages, make_batches, method, batch_stats, M):
    options = {} if batch_stats is None else {"batch_stats": batch_stats}
    algorithm = method(
        stages, naive.squared_error, optax.adam(0.01), microbatches=M, skip_nonfinite=True, donate=True, **options
    )
    batches = spoilt(make_batches(7, examples=8), "inputs")
    state = algorithm.init(KEY, batches[0])
    dropped = np.zeros(3)
    for batch in batches:
        state, info = algorithm.step(state, batch)
        seen = skipped(info)
        dropped[3 - len(seen) :] += seen
    assert dropped.tolist() == [1, 1, 1] and np.isfinite(info.loss)
    kept = state.params, state.model_state, state.opt_state
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))
    assert np.isfinite(algorithm.predict(state, batches[0].inputs)).all()


def test_a_loss_that_is_not_finite_drops_updates_of_finite_gradients(naive, make_batches):
    """The last stage sends down what is not finite, so that the others drop theirs too."""

    def loss_fn(y, z):
        return naive.squared_error(y, z) + jnp.where(z[0, 0] > 5, jnp.inf, 0.0)

    for devices in (1, 2):
        placement = fr.placement(2, jax.devices()[:devices])
        stages = [naive.dense(4).stage, naive.dense(2).stage]
        algorithm = fr.backprop(stages, loss_fn, optax.sgd(0.1), skip_nonfinite=True, placement=placement)
        batch = make_batches(1)[0]
        state = algorithm.init(KEY, batch)
        after, info = algorithm.step(state, batch._replace(targets=batch.targets.at[0, 0].set(6.0)))
        assert np.isposinf(info.loss) and skipped(info) == [1, 1]
        chex.assert_trees_all_equal(after.params, state.params)
        moved, info = algorithm.step(after, batch)
        assert np.isfinite(info.loss) and skipped(info) == [0, 0]
        assert not np.array_equal(moved.params[0]["W"], state.params[0]["W"])


def test_a_dropped_update_is_not_the_last_one_that_prediction_repeats(naive, make_batches):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    algorithm = fr.features_replay(
        stages, naive.squared_error, optax.sgd(0.1), weight_prediction=1.0, skip_nonfinite=True
    )
    state, last = algorithm.init(KEY, make_batches(1)[0]), []
    for batch in spoilt(make_batches(5), "inputs"):
        state, _ = algorithm.step(state, batch)
        last.append(state.opt_state[0].last_update["W"])
    np.testing.assert_array_equal(last[BAD + 1], last[BAD])  # its gradient arrives one step late
    assert np.abs(last[BAD]).max() > 0 and not np.array_equal(last[BAD + 2], last[BAD])


def test_without_the_option_nothing_is_added(naive, make_batches, run):
    states, infos = run(fr.backprop([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1)), make_batches(1))
    assert set(infos[0].metrics) == {"gradient_norm/1"}
    assert jax.tree.structure(states[1].opt_state[0]) == jax.tree.structure(optax.sgd(0.1).init(states[1].params[0]))


def test_it_waits_for_no_device_and_compiles_once(naive, stages, make_batches, compilations, no_waiting):
    batches = make_batches(6)
    algorithm = fr.features_replay(stages, naive.squared_error, optax.adam(0.1), skip_nonfinite=True, donate=True)
    state = algorithm.init(KEY, batches[0])
    for t, batch in enumerate(batches):
        compilations.clear()
        state, _ = algorithm.step(state, batch)
        assert t < 3 or not compilations
