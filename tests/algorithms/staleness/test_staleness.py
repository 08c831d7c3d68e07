import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import _delayed, staleness
from fr_jax.training.checkpoints import Checkpoints

STEPS = 12
close = {"rtol": 1e-11, "atol": 1e-12}
# name -> (factor, every, weight_prediction)
REMEDIES = {
    "shrink": (0.5, 1, 0.0),
    "accumulate": (1.0, 3, 0.0),
    "predict": (1.0, 1, 1.0),
    "all three": (0.7, 2, 0.6),
}


def remedied(stages, loss_fn, optimizer, remedy, **kwargs):
    """Features replay with the remedies."""
    factor, every, weight_prediction = remedy
    optimizers = staleness.shrink_gradients(staleness.accumulate(optimizer, every), factor, len(stages))
    return fr.features_replay(stages, loss_fn, optimizers, weight_prediction=weight_prediction, **kwargs)


def literal(naive, modules, updates, start, batches, remedy):
    """Algorithm 1 with the remedies as their papers have them; (w[k][t], gradients[k][t], loss[t]), k from 0.

    FDG: a module multiplies the delta that it receives. ADL: gradients are put aside until there are m of them.
    SpecTrain: the play uses w + (updates until the replay) (last update).
    """
    factor, every, weight_prediction = remedy
    K = len(modules)
    w = [[p] for p in jax.tree.map(np.asarray, start.params)]
    state, keys = start.model_state, naive.layer_keys(modules, start)
    last = [jax.tree.map(np.zeros_like, w[k][0]) for k in range(K)]
    h, delta, waiting, gradients = ([[] for _ in modules] for _ in range(4))
    delta, loss = [{} for _ in modules], []
    for t, batch in enumerate(batches):
        x = np.asarray(batch.inputs)
        for k in range(K):
            h[k].append(x)
            n = sum((len(waiting[k]) + j) % every == 0 for j in range(1, K - k))
            w_hat = jax.tree.map(lambda w, u, n=n: w + weight_prediction * n * u, w[k][t], last[k])
            x, _, _ = naive.forward(modules[k], w_hat, state[k], x, keys(k, t))
        targets = np.asarray(batch.targets)
        loss.append(naive.squared_error(x, targets))
        for k in range(K):
            s = t - (K - 1 - k)
            w[k].append(w[k][t])
            if s < 0:
                continue
            y, _, pull = naive.forward(modules[k], w[k][t], state[k], h[k][s], keys(k, s))
            received = 2 * (y - targets) / len(y) if k == K - 1 else factor * delta[k][t]
            g, dx = pull(received)
            if k > 0:
                delta[k - 1][t + 1] = dx
            gradients[k].append(g)
            waiting[k].append(g)
            if len(waiting[k]) == every:
                mean = jax.tree.map(lambda *g: sum(g) / every, *waiting[k])
                w[k][t + 1] = updates[k](w[k][t], mean)
                last[k] = jax.tree.map(lambda new, old: new - old, w[k][t + 1], w[k][t])
                waiting[k] = []
    return w, gradients, loss


@pytest.fixture
def check(naive, make_batches, run):
    """Runs the library and the literal loop side by side."""

    def check(K, optimizer, remedy):
        modules = [(naive.dense(4), naive.dense(5)) if k % 2 else (naive.dense(5),) for k in range(K - 1)]
        modules = [*modules, (naive.dense(2),)]
        ours, theirs = naive.OPTIMIZERS[optimizer]
        algorithm = remedied(
            [naive.stage(module) for module in modules], naive.squared_error, ours(), remedy, return_grads=True
        )
        batches = make_batches(STEPS)
        states, infos = run(algorithm, batches)
        w, gradients, loss = literal(naive, modules, [theirs() for _ in modules], states[0], batches, remedy)
        for t, state in enumerate(states):
            chex.assert_trees_all_close(state.params, tuple(w[k][t] for k in range(K)), **close)
        np.testing.assert_allclose([info.loss for info in infos], loss, **close)
        for k in range(K):
            shrunk = lambda g, k=k: remedy[0] ** (K - 1 - k) * np.asarray(g)
            reported = [jax.tree.map(shrunk, info.grads[k]) for info in infos if info.grads[k] is not None]
            chex.assert_trees_all_close(reported, gradients[k], **close)
        return states

    return check


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "optimizer", "remedy"),
    [
        *((3, "nesterov", remedy) for remedy in REMEDIES),
        pytest.param(2, "sgd", "all three", marks=pytest.mark.slow),
        (3, "adam", "predict"),
        (4, "nesterov", "all three"),
    ],
)
def test_trajectory_equals_the_equations(check, K, optimizer, remedy):
    check(K, optimizer, REMEDIES[remedy])


@pytest.mark.usefixtures("x64")
def test_under_accumulation_a_schedule_counts_updates(check):
    check(2, "decaying", (1.0, 3, 1.0))


@pytest.fixture(scope="module")
def stages(naive):
    """K = 3 modules with dropout and running statistics."""
    return [
        naive.stage((naive.dense(4), naive.dropout(0.2))),
        naive.stage((naive.dense(3), naive.batch_norm())),
        naive.dense(2).stage,
    ]


@pytest.mark.usefixtures("x64")
def test_switched_off_they_are_the_plain_method(naive, stages, make_batches, run):
    make, _ = naive.OPTIMIZERS["nesterov"]
    plain, _ = run(fr.features_replay(stages, naive.squared_error, make()), make_batches(STEPS))
    off, _ = run(remedied(stages, naive.squared_error, make(), (1, 1, 0)), make_batches(STEPS))
    assert jax.tree.structure(plain) == jax.tree.structure(off)
    strip = lambda state: state._replace(streams=())
    chex.assert_trees_all_equal([strip(state) for state in plain], [strip(state) for state in off])


def test_switched_off_they_are_not_there():
    sgd = optax.sgd(0.1)
    assert staleness.accumulate(sgd, 1) is sgd
    assert staleness.shrink_gradients(sgd, 1.0, 3) == (sgd, sgd, sgd)
    w, opt_state = jnp.ones(2), ()
    assert all(ahead(w, opt_state, 2) is w for ahead in _delayed.make_ahead([None] * 3, _delayed.Remedies()))


@pytest.mark.usefixtures("x64")
def test_the_last_module_is_not_stale_and_pays_nothing(naive, stages, make_batches):
    adam = optax.adam(0.1)
    assert staleness.shrink_gradients(adam, 0.5, 3)[-1] is adam
    algorithm = remedied(stages, naive.squared_error, adam, (1.0, 1, 1.0))
    state = algorithm.init(jax.random.key(1), make_batches(1)[0])
    kinds = [isinstance(opt_state, staleness.RememberUpdateState) for opt_state in state.opt_state]
    assert kinds == [True, True, False]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [fr.backprop, fr.features_replay])
@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(optax.sgd(0.1, momentum=0.9), marks=pytest.mark.slow), optax.adam(0.01)],
    ids=["momentum", "adam"],
)
def test_one_module_accumulating_equals_the_larger_batch(naive, make_batches, run, method, optimizer):
    stage, every = naive.stage((naive.dense(4), naive.dense(2))), 3
    small = make_batches(4 * every)
    groups = [small[i : i + every] for i in range(0, len(small), every)]
    large = [fr.Batch(*(jnp.concatenate(leaves) for leaves in zip(*(b[:2] for b in g), strict=True))) for g in groups]
    accumulated, _ = run(method([stage], naive.squared_error, staleness.accumulate(optimizer, every)), small)
    whole, _ = run(method([stage], naive.squared_error, optimizer), large)
    for i, state in enumerate(whole):
        chex.assert_trees_all_close(accumulated[i * every].params, state.params, **close)
        chex.assert_trees_all_close(accumulated[i * every].opt_state[0].inner_state, state.opt_state[0], **close)
    for t in range(len(small)):
        same = np.array_equal(*(state.params[0][0]["W"] for state in accumulated[t : t + 2]))
        assert same == ((t + 1) % every != 0)


def test_all_modules_form_the_same_groups_of_mini_batches(naive, stages, make_batches, run):
    """A module without a gradient yet counts nothing."""
    K, every = 3, 4
    states, _ = run(remedied(stages, naive.squared_error, optax.sgd(0.1), (1.0, every, 0.0)), make_batches(STEPS))
    for t, state in enumerate(states):
        assert [int(s.count) for s in state.opt_state] == [max(0, t - (K - k)) % every for k in range(1, K + 1)]


def test_accumulation_equals_that_of_optax():
    rng = np.random.default_rng(3)
    params = {"W": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "b": jnp.zeros(2)}
    optimizer = optax.adamw(0.01, weight_decay=0.1)
    ours, theirs = staleness.accumulate(optimizer, 3), optax.MultiSteps(optimizer, 3).gradient_transformation()
    a, b = ours.init(params), theirs.init(params)
    update, update_theirs = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(9):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        (u, a), (v, b) = update(grads, a, params), update_theirs(grads, b, params)
        chex.assert_trees_all_close(u, v, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_sums_are_never_narrower_than_the_gradients(dtype):
    params = jnp.ones(3, dtype)
    optimizer = staleness.remember_update(staleness.accumulate(optax.sgd(0.1), 2))
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jnp.ones(3, dtype), state, params)
        assert updates.dtype == state.last_update.dtype == dtype
        assert state.inner_state.total.dtype == jnp.promote_types(dtype, jnp.float32)
        assert staleness.predicted(params, state, 3, 0.5).dtype == dtype


def test_accumulation_recovers_from_a_bad_mini_batch():
    """The sum starts afresh, and what the optimizer makes of a partial sum is not looked at."""
    inverse = optax.stateless(lambda updates, params: jax.tree.map(lambda g: 1 / (g - 1), updates))
    optimizer = staleness.accumulate(inverse, 2)
    state = optimizer.init(jnp.zeros(()))
    seen = []
    for g in (2.0, 4.0, jnp.nan, 0.0, 2.0, 4.0):
        u, state = optimizer.update(jnp.asarray(g), state)
        seen.append(float(u))
    np.testing.assert_array_equal(seen, [0, 0.5, 0, np.nan, 0, 0.5])


def test_optimizers_with_random_keys_accumulate():
    optimizer = staleness.accumulate(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), 2)
    state = optimizer.init(jnp.zeros(3))
    key = lambda state: jax.random.key_data(jax.tree.leaves(state.inner_state)[-1])
    _, half = optimizer.update(jnp.ones(3), state)
    _, full = optimizer.update(jnp.ones(3), half)
    assert np.array_equal(key(half), key(state)) and not np.array_equal(key(full), key(state))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_prediction_is_that_of_spectrain(momentum):
    """w - s eta v, with v the momentum."""
    rate, s, rng = 0.1, 3, np.random.default_rng(3)
    optimizer = staleness.remember_update(optax.sgd(rate, momentum=momentum))
    w = jnp.asarray(rng.normal(size=4))
    state, v = optimizer.init(w), np.zeros(4)
    for _ in range(5):
        np.testing.assert_allclose(staleness.predicted(w, state, s), w - s * rate * v, **close)
        g = rng.normal(size=4)
        v = (momentum or 0) * v + g
        updates, state = optimizer.update(jnp.asarray(g), state, w)
        w = optax.apply_updates(w, updates)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 2, 3])
def test_prediction_is_exact_where_the_gradient_is_constant(every):
    """It knows how many updates there will be."""
    (optimizer,) = staleness.shrink_gradients(staleness.accumulate(optax.sgd(0.1), every), 0.5, 1)
    optimizer = staleness.remember_update(optimizer)
    w, states = [jnp.asarray([1.0, 2.0])], [optimizer.init(jnp.zeros(2))]
    for _ in range(12):
        updates, state = optimizer.update(jnp.asarray([3.0, -1.0]), states[-1], w[-1])
        w.append(optax.apply_updates(w[-1], updates))
        states.append(state)
    for horizon in range(5):
        for t in range(every, len(w) - horizon):
            chex.assert_trees_all_close(staleness.predicted(w[t], states[t], horizon), w[t + horizon], **close)
    chex.assert_trees_all_equal(staleness.predicted(w[-1], states[-1], 4, strength=0.0), w[-1])


K = 3
PLACEMENTS = {
    "default": lambda: None,
    "K": lambda: fr.placement(K, jax.devices()[:K]),
    "split over 2 each": lambda: fr.placement(K, jax.devices()[: 2 * K], data_parallel=2),
}


@pytest.fixture(scope="module")
def cached(naive, stages):
    """``(placement, remedy, donate) -> Algorithm``; who asks again gets the same one, and its compiled functions."""

    @functools.cache
    def make(placement, remedy, donate):
        options = {"placement": PLACEMENTS[placement](), "donate": donate}
        return remedied(stages, naive.squared_error, optax.adam(0.01), REMEDIES[remedy], **options)

    return make


@pytest.fixture
def make(cached, x64):
    return lambda placement="default", remedy="all three", donate=False: cached(placement, remedy, donate)


def numbers(state):
    """Everything in a state, on the host."""
    state = state._replace(streams=[jax.random.key_data(stream.key) for stream in state.streams])
    return jax.tree.map(np.asarray, state)


def test_devices_do_not_change_the_numbers(make, make_batches, run):
    runs = {name: run(make(name), make_batches(8))[0] for name in PLACEMENTS}
    for name in ("K", "split over 2 each"):
        for k, sharding in enumerate(PLACEMENTS[name]()):
            for leaf in jax.tree.leaves((runs[name][-1].params[k], runs[name][-1].opt_state[k])):
                assert leaf.devices() == sharding.device_set
    runs = {name: [numbers(state) for state in states] for name, states in runs.items()}
    chex.assert_trees_all_equal(runs["default"], runs["K"])
    chex.assert_trees_all_close(runs["default"], runs["split over 2 each"], **close)


@pytest.mark.parametrize(
    ("placement", "remedy"),
    [
        pytest.param("default", "predict", marks=pytest.mark.slow),
        pytest.param("K", "accumulate", marks=pytest.mark.slow),
        ("split over 2 each", "all three"),
    ],
)
def test_donation_changes_no_bit_and_frees_the_old_state(make, make_batches, placement, remedy):
    kept, donated = (make(placement, remedy, donate) for donate in (False, True))
    batches = make_batches(8)
    a, b = (algorithm.init(jax.random.key(1), batches[0]) for algorithm in (kept, donated))
    for t, batch in enumerate(batches):
        old = b
        a, _ = kept.step(a, batch)
        b, _ = donated.step(b, batch)
        updated = [k for k in range(K) if t + (k + 1) - K >= 0]
        assert all(leaf.is_deleted() for k in updated for leaf in jax.tree.leaves((old.params[k], old.opt_state[k])))
    chex.assert_trees_all_equal(numbers(a), numbers(b))


@pytest.mark.parametrize(
    ("placement", "donate"),
    [
        pytest.param("default", False, marks=pytest.mark.slow),
        pytest.param("K", True, marks=pytest.mark.slow),
        ("split over 2 each", True),
    ],
)
@pytest.mark.usefixtures("no_waiting")
def test_a_step_only_issues_work(make, make_batches, compilations, placement, donate):
    algorithm = make(placement, donate=donate)
    batches = jax.device_put(make_batches(K + 7), jax.devices()[0])
    state = algorithm.init(jax.random.key(1), batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches[: K + 1]:
            state, _ = algorithm.step(state, batch)
        compilations.clear()  # that they would be seen: test_functions.py
        for batch in batches[K + 1 :]:
            state, _ = algorithm.step(state, batch)
    assert compilations == []


def test_states_keep_their_structure_and_survive_a_checkpoint(make, make_batches, run, tmp_path):
    batches = make_batches(8)
    algorithm = make()
    states, _ = run(algorithm, batches)
    describe = lambda state: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state._replace(step=()))]
    for t, state in enumerate(states):
        assert jax.tree.structure(state._replace(step=0)) == jax.tree.structure(states[0])
        assert describe(state) == describe(states[0])
        assert state.step == t and all(isinstance(x, jax.Array) for x in jax.tree.leaves(state.opt_state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, states[5], {})
        restored = checkpoints.restore(algorithm.init(jax.random.key(2), batches[0])).state
    for batch in batches[5:]:
        restored, _ = algorithm.step(restored, batch)
    chex.assert_trees_all_equal(numbers(restored), numbers(states[-1]))


sgd = optax.sgd(0.1)
multi = optax.MultiSteps(sgd, 2).gradient_transformation()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: staleness.shrink_gradients(sgd, 0.0, 2), "factor = 0.0 was given; it must be above 0 and at most 1"),
        (lambda: staleness.shrink_gradients(sgd, 1.5, 2), "factor = 1.5"),
        (lambda: staleness.shrink_gradients(sgd, float("nan"), 2), "factor = nan"),
        (lambda: staleness.shrink_gradients(sgd, "0.5", 2), "factor = '0.5'"),
        (lambda: staleness.shrink_gradients(sgd, 0.5, 0), "K = 0 was given; it must be a whole number, at least 1"),
        (lambda: staleness.shrink_gradients([sgd], 0.5, 2), "1 optimizers were given for K = 2 stages"),
        (lambda: staleness.shrink_gradients([sgd, None], 0.5, 2), "None is not an optax transformation"),
        (lambda: staleness.shrink_gradients(None, 0.5, 2), "None is not an optax transformation"),
        (lambda: staleness.accumulate(sgd, 0), "every = 0 was given; it must be a whole number, at least 1"),
        (lambda: staleness.accumulate(sgd, 2.0), "every = 2.0"),
        (lambda: staleness.accumulate(sgd, True), "every = True"),
        (lambda: staleness.accumulate([sgd, sgd], 2), "Wrap several one by one"),
        (lambda: staleness.remember_update((sgd, sgd)), "Wrap several one by one"),
        (lambda: staleness.predicted(1.0, sgd.init(1.0), 1), "without a last update. Wrap the optimizer: "),
        (lambda: staleness.remember_update(multi).init(jnp.ones(2)), "Use one fr_jax.staleness.accumulate"),
        (
            lambda: staleness.remember_update(staleness.accumulate(staleness.accumulate(sgd, 2), 2)).init(jnp.ones(2)),
            "several times over",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("weight_prediction", [-0.5, float("nan"), float("inf"), "1", None])
def test_a_prediction_that_cannot_be_is_refused(naive, weight_prediction):
    with pytest.raises(ValueError, match="it must be a number, 0 or more: 0 is off, 1 goes to the weights"):
        fr.features_replay([naive.dense(2).stage], naive.squared_error, sgd, weight_prediction=weight_prediction)


def test_a_numpy_number_is_a_number():
    assert staleness.shrink_gradients(sgd, np.float32(1.0), np.int64(2)) == (sgd, sgd)
    assert staleness.accumulate(sgd, np.int64(1)) is sgd
    state = staleness.accumulate(sgd, np.int64(2)).init(jnp.ones(2))
    assert state.total.shape == (2,) and hash(state.period) == hash(
        staleness.accumulate(sgd, 2).init(jnp.ones(2)).period
    )
