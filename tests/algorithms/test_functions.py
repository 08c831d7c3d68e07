"""What holds for the step of every method: devices, donation, immutability, no waiting, no recompilation."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

pytestmark = pytest.mark.usefixtures("x64")  # in all, so that what one test has compiled serves the next


def dni(stages, loss_fn, optimizer, **kwargs):
    synthesizer = fr.Stage(
        lambda key, h: ({"a": jnp.full(h.shape[-1], 0.1, h.dtype)}, ()),
        lambda params, state, h, *, key=None, train=True: ((h + 1) * params["a"][None], state),
    )
    return fr.dni(stages, loss_fn, optimizer, synthesizer, optax.adam(0.01), **kwargs)


def cached(method, stages, loss_fn, optimizer, **kwargs):
    """Every mini-batch holds the same examples: of BlockProp's all are due in every other step."""
    algorithm = method(stages, loss_fn, optimizer, cache_size=8, **kwargs)
    indexed = lambda batch: batch._replace(index=np.array([6, 2, 7, 0, 1, 3], np.int32))
    return algorithm._replace(
        init=lambda key, batch: algorithm.init(key, indexed(batch)),
        step=lambda state, batch: algorithm.step(state, indexed(batch)),
    )


METHODS = {
    "blockprop": fr.blockprop,
    "blockprop-cached": functools.partial(cached, fr.blockprop, h_every=2, h_steps=2),
    "bp": fr.backprop,
    "ddg": fr.ddg,
    "dfa": fr.direct_feedback_alignment,
    "dni": dni,
    "fr": fr.features_replay,
    "fr-replay": lambda *args, **kwargs: fr.features_replay(*args, batch_stats="replay", **kwargs),
    "fr-both": lambda *args, **kwargs: fr.features_replay(*args, batch_stats="both", **kwargs),
    "gpipe": functools.partial(fr.gpipe, microbatches=3),
    "mac": functools.partial(fr.auxiliary_coordinates, w_steps=2, z_steps=2, penalty_patience=1),
    "mac-cached": functools.partial(cached, fr.auxiliary_coordinates, penalty_patience=1),
    "proxprop": fr.proximal_backprop,
    "1f1b": functools.partial(fr.gpipe, microbatches=3, schedule="1f1b"),
    "bp-M": functools.partial(fr.backprop, microbatches=3),
    "fr-M": functools.partial(fr.features_replay, microbatches=3, weight_prediction=0.5),
    "fr-corrected": functools.partial(fr.features_replay, microbatches=3, discrepancy_decay=0.5),
    "fr-stashed": functools.partial(fr.features_replay, microbatches=3, replay_weights="stashed"),
    "ddg-M": functools.partial(fr.ddg, microbatches=3),
    "2bw": functools.partial(fr.pipedream_2bw, microbatches=3),
}
M = {name: 3 for name, method in METHODS.items() if "microbatches" in getattr(method, "keywords", {})}
SLOW_BLOCKPROP = pytest.param("blockprop", marks=pytest.mark.slow)  # the cached one goes the same ways
# Every stage updates from the first iteration on, or at least one holds old weights in flight.
LOCKED = {"blockprop", "blockprop-cached", "bp", "bp-M", "dfa", "dni", "gpipe", "1f1b", "mac", "mac-cached", "proxprop"}
STASHING = {"ddg", "ddg-M", "fr-stashed", "2bw"}
K = 3
# name -> a placement of K stages
PLACEMENTS = {
    "default": lambda: None,
    "1": lambda: fr.placement(K, jax.devices()[:1]),
    "2": lambda: fr.placement(K, jax.devices()[:2]),
    "K": lambda: fr.placement(K, jax.devices()[:K]),
    "split over 2": lambda: fr.placement(K, jax.devices()[:2], data_parallel=2),
    "split over 2 each": lambda: fr.placement(K, jax.devices()[: 2 * K], data_parallel=2),
}

CROSSED = ("default", "K", "split over 2 each")  # where every feature goes to other devices, and where none does


@pytest.fixture(scope="module")
def modules(naive):
    """K modules with dropout and running statistics."""
    return (naive.dense(4), naive.dropout(0.2)), (naive.dense(3), naive.batch_norm()), (naive.dense(2),)


@pytest.fixture(scope="module")
def make(naive, modules):
    """``(method, placement, donate) -> Algorithm`` of K stages with everything that a state can hold.

    Who asks again gets the same one, and its compiled functions.
    """
    stages = [naive.stage(module) for module in modules]

    @functools.cache
    def cached(method, placement, donate):
        options = {"placement": PLACEMENTS[placement](), "donate": donate}
        return METHODS[method](stages, naive.squared_error, optax.adam(0.01), **options)

    return lambda method, placement="default", donate=False: cached(method, placement, donate)


def numbers(state):
    """Everything in a state, on the host."""
    state = state._replace(streams=[jax.random.key_data(s.key) for s in state.streams])
    if hasattr(state, "synthesizers"):
        state = state._replace(synthesizers=[M[:-1] for M in state.synthesizers])
    if hasattr(state, "history"):  # a kept VJP is a tree that equals no other, but its leaves can be compared
        state = state._replace(history=jax.tree.leaves(state.history))
    return jax.tree.map(np.asarray, state)


def assert_each_module_is_on_its_devices(state, shardings):
    for k, sharding in enumerate(shardings):
        parts = [state.params[k], state.model_state[k], state.opt_state[k], state.streams[k]]
        for name in ("history", "deltas", "synthesizers", "cache", "visits", "penalty", "feedback"):
            parts += getattr(state, name, ())[k : k + 1]
        assert {frozenset(leaf.devices()) for leaf in jax.tree.leaves(parts)} == {frozenset(sharding.device_set)}


@pytest.mark.parametrize(
    ("method", "placements"),
    [
        *(
            (method, CROSSED)
            for method in ("bp", "ddg", "dfa", "dni", "gpipe", "blockprop-cached", "mac-cached", "proxprop")
        ),
        ("fr", (*CROSSED, "2")),
        ("fr-M", (*CROSSED, "2")),
        ("ddg-M", CROSSED),
        *(
            pytest.param(name, CROSSED, marks=pytest.mark.slow)
            for name in ("bp-M", "1f1b", "2bw", "fr-stashed", "fr-corrected", "mac")
        ),
        pytest.param("fr", ("default", "1", "split over 2"), marks=pytest.mark.slow),
        pytest.param("blockprop", CROSSED, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_devices_do_not_change_the_numbers(make, make_batches, run, method, placements):
    batches = make_batches(6)
    runs, outputs = {}, {}
    for name in placements:
        algorithm = make(method, name)
        states, _ = run(algorithm, batches)
        for state in (states[0], states[-1]) if name != "default" else ():
            assert_each_module_is_on_its_devices(state, PLACEMENTS[name]())
        runs[name] = [numbers(state) for state in states]
        outputs[name] = np.asarray(algorithm.predict(states[-1], batches[0].inputs))
    if "2" in runs:
        chex.assert_trees_all_equal(runs["2"], runs["K"])
    # Back-propagation is one fused function on one device, a chain of functions on several.
    if method not in ("bp", "bp-M") and "K" in runs:
        chex.assert_trees_all_equal(runs["default"], runs["K"])
    for name in runs:
        chex.assert_trees_all_close(runs["default"], runs[name], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(outputs["default"], outputs[name], rtol=1e-11)


@pytest.mark.parametrize(
    "method", ["bp", "fr", "ddg", "dfa", "dni", "gpipe", SLOW_BLOCKPROP, "blockprop-cached", "mac-cached", "proxprop"]
)
def test_a_state_is_still_good_after_its_step(make, make_batches, run, method):
    algorithm = make(method)
    batches = make_batches(K + 1)
    states, _ = run(algorithm, batches)
    for state in (states[0], states[K]):
        before = numbers(state)
        first, second = (algorithm.step(state, batches[0]) for _ in range(2))
        chex.assert_trees_all_equal(before, numbers(state))
        chex.assert_trees_all_equal(numbers(first[0]), numbers(second[0]))
        chex.assert_trees_all_equal(first[1], second[1])


@pytest.mark.parametrize(
    ("method", "placement"),
    [
        pytest.param("bp", "1", marks=pytest.mark.slow),
        ("bp", "default"),
        ("bp", "K"),
        ("fr", "default"),
        ("fr-both", "2"),
        ("fr-replay", "split over 2 each"),
        pytest.param("fr-replay", "split over 2", marks=pytest.mark.slow),
        pytest.param("ddg", "default", marks=pytest.mark.slow),
        ("ddg", "split over 2 each"),
        ("dfa", "split over 2 each"),
        ("mac-cached", "split over 2 each"),
        ("proxprop", "split over 2 each"),
        pytest.param("dni", "default", marks=pytest.mark.slow),
        ("dni", "split over 2 each"),
        pytest.param("blockprop", "default", marks=pytest.mark.slow),
        pytest.param("blockprop-cached", "default", marks=pytest.mark.slow),
        ("blockprop-cached", "split over 2 each"),
        pytest.param("gpipe", "K", marks=pytest.mark.slow),
        ("gpipe", "split over 2 each"),
        ("fr-M", "split over 2 each"),
        ("ddg-M", "K"),
        *(
            pytest.param(name, place, marks=pytest.mark.slow)
            for name in ("bp-M", "1f1b", "2bw", "fr-stashed", "fr-corrected")
            for place in ("default", "split over 2 each")
        ),
    ],
)
def test_donation_changes_no_bit_and_frees_the_old_state(make, make_batches, method, placement):
    kept, donated = make(method, placement), make(method, placement, donate=True)
    batches = make_batches(8)
    a, b = (algorithm.init(jax.random.key(1), batches[0]) for algorithm in (kept, donated))
    for t, batch in enumerate(batches):
        old = b
        a, _ = kept.step(a, batch)
        b, _ = donated.step(b, batch)
        # Looking at b here would hold on to its buffers, which then are copied and not donated (jax 0.11).
        # The first update follows the last micro-batch of mini-batch 0, K-1-k sub-iterations late.
        first = lambda k: 0 if method in LOCKED else (M.get(method, 1) - 1 + K - 1 - k) // M.get(method, 1)
        updated = [k for k in range(K) if t >= first(k)]
        replaced = [old.opt_state[k] for k in updated]
        keeps = lambda k: method in STASHING and (k < K - 1 or method == "2bw")
        replaced += [old.params[k] for k in updated if not keeps(k)]
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(replaced))
        if method.startswith("fr") and t >= K:  # the oldest entry of stage 2 has been replayed
            assert all(entry.is_deleted() for entry in jax.tree.leaves(old.history[1].entries[0]))
    chex.assert_trees_all_equal(numbers(a), numbers(b))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batches))


@pytest.mark.parametrize("method", ["fr", "ddg"])
def test_a_step_that_is_traced_says_so(make, make_batches, method):
    algorithm, (batch,) = make(method), make_batches(1)
    with pytest.raises(TypeError, match=r"state.step has no value.*without jax.jit"):
        jax.jit(algorithm.step)(algorithm.init(jax.random.key(0), batch), batch)


def test_a_useless_donation_would_be_seen():
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        jax.jit(lambda x: x[0], donate_argnums=0)(jnp.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda x: x + 1, donate_argnums=0)(jnp.ones(3))


@pytest.mark.parametrize("donate", [False, True])
def test_a_stage_may_return_its_input(naive, make_batches, run, donate):
    """Then features, history entries and the batch could share a buffer that is donated."""
    same = fr.Stage(lambda key, x: ((), ()), lambda params, state, x, *, key=None, train=True: (x, state))
    keeps = fr.Stage(  # what it is given is also what it carries along and what it is optimised with
        lambda key, x: (x[0], x[0]), lambda params, state, x, *, key=None, train=True: (x + params[None], state)
    )
    copy = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, state))
    algorithm = fr.features_replay(
        [same, same, keeps, same, naive.dense(2).stage], naive.squared_error, copy, donate=donate
    )
    batches = make_batches(8)
    states, infos = run(algorithm, batches)
    assert np.isfinite([info.loss for info in infos]).all()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batches))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states[-1]._replace(step=())))


@pytest.mark.parametrize(
    ("method", "placement", "donate"),
    [
        ("bp", "default", False),
        ("bp", "K", True),
        ("fr", "default", False),
        ("fr-both", "2", True),
        ("fr-replay", "split over 2 each", True),
        pytest.param("ddg", "K", False, marks=pytest.mark.slow),
        ("ddg", "split over 2 each", True),
        ("dfa", "split over 2 each", True),
        ("mac-cached", "split over 2 each", True),
        ("proxprop", "split over 2 each", True),
        pytest.param("dni", "default", True, marks=pytest.mark.slow),
        ("dni", "split over 2 each", True),
        pytest.param("blockprop", "K", True, marks=pytest.mark.slow),
        pytest.param("blockprop-cached", "default", True, marks=pytest.mark.slow),
        ("blockprop-cached", "K", False),
        pytest.param("gpipe", "K", False, marks=pytest.mark.slow),
        ("gpipe", "split over 2 each", True),
        ("fr-M", "K", True),
        ("ddg-M", "split over 2 each", True),
        *(
            pytest.param(name, "split over 2 each", donate, marks=pytest.mark.slow)
            for name in ("bp-M", "1f1b", "2bw", "fr-stashed", "fr-corrected", "fr-M")
            for donate in (False, True)
        ),
    ],
)
@pytest.mark.usefixtures("no_waiting")
def test_a_step_only_issues_work(make, make_batches, compilations, method, placement, donate):
    """No look at a value, no copy to or from the host, and nothing compiled once the pipeline is full."""
    algorithm = make(method, placement, donate=donate)
    batches = jax.device_put(make_batches(K + 11), jax.devices()[0])
    state = algorithm.init(jax.random.key(1), batches[0])
    jax.jit(lambda x: x + 1)(state.params[-1]["b"])  # the step itself may have been compiled before
    assert compilations
    with jax.transfer_guard("disallow"):
        for batch in batches[: K + 1]:
            state, _ = algorithm.step(state, batch)
        compilations.clear()
        for batch in batches[K + 1 :]:
            state, _ = algorithm.step(state, batch)
    assert compilations == []


def test_the_guard_would_see_a_copy_from_the_host():
    double = jax.jit(lambda x: 2 * x)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        double(np.ones(3))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    "look",
    [
        float,
        bool,
        str,
        lambda x: x.item(),
        lambda x: np.asarray(x),
        lambda x: x.block_until_ready(),
        lambda x: jax.block_until_ready(x),
        lambda x: jax.device_get(x),
    ],
)
def test_the_spies_would_see_a_look(look):
    with pytest.raises(pytest.fail.Exception, match="waited for a device"):
        look(jnp.ones(()))


@pytest.mark.parametrize("placement", ["default", "K"])
def test_a_loader_may_reuse_its_numpy_buffer(naive, make_batches, run, placement):
    """Features replay reads a batch K-1 steps later, and JAX may share the memory of an aligned NumPy array."""

    def aligned(shape):
        raw = np.empty(np.prod(shape) + 8, np.float64)
        start = (-raw.ctypes.data // 8) % 8
        return raw[start : start + np.prod(shape)].reshape(shape)

    batches = make_batches(2 * K, examples=16)
    stages = [naive.dense(2).stage] * K
    algorithm = fr.features_replay(stages, naive.squared_error, optax.sgd(0.1), placement=PLACEMENTS[placement]())
    expected, _ = run(algorithm, batches)
    buffer = fr.Batch(aligned((16, 3)), aligned((16, 2)))

    def load():
        for batch in batches:
            jax.tree.map(np.copyto, buffer, jax.tree.map(np.asarray, batch))
            yield buffer

    state = algorithm.init(jax.random.key(1), buffer)
    for batch in load():
        state, _ = algorithm.step(state, batch)
        jax.block_until_ready(state.params)
    chex.assert_trees_all_equal(numbers(state), numbers(expected[-1]))


def test_predict_is_the_network_in_inference_mode(make, modules, make_batches, run):
    """That it is the same on all devices is part of the test of devices."""
    batches = make_batches(4)
    algorithm = make("fr", "K")
    states, _ = run(algorithm, batches)
    params, model_state = jax.device_put((states[-1].params, states[-1].model_state), jax.devices()[0])
    h = batches[0].inputs
    for k, module in enumerate(modules):
        for j, layer in enumerate(module):
            place = (k, j) if len(module) > 1 else (k,)
            p, s = (functools.reduce(lambda tree, i: tree[i], place, tree) for tree in (params, model_state))
            h, same = layer.stage.apply(p, s, h, train=False)
            chex.assert_trees_all_equal(same, s)
    np.testing.assert_allclose(algorithm.predict(states[-1], batches[0].inputs), h, rtol=1e-5, atol=1e-6)
    few = algorithm.predict(states[-1], batches[0].inputs[:2])  # another batch size is welcome here
    np.testing.assert_allclose(few, h[:2], rtol=1e-5, atol=1e-6)
