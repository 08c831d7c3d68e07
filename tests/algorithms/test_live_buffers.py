"""What is alive between steps and at every call inside a step: ``jax.live_arrays`` beside what the equations need."""

import functools
import gc
import weakref
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import _functions as steps
from fr_jax.algorithms import _training
from fr_jax.diagnostics.memory.step_memory import step_memory

B, K, M = 12, 3, 3  # no other test has 12 examples of these widths
WIDTHS = (5, 7, 11, 3)  # x, h_1, h_2, h_3: every array of this test is known by its shape
FUNCTIONS = ("play", "replay", "train", "forward", "pull", "update")


METHODS = {
    "bp": fr.backprop,
    "fr": fr.features_replay,
    "ddg": fr.ddg,
    "dfa": fr.direct_feedback_alignment,
    "gpipe": functools.partial(fr.gpipe, microbatches=M),
    "1f1b": functools.partial(fr.gpipe, microbatches=M, schedule="1f1b"),
    "2bw": functools.partial(fr.pipedream_2bw, microbatches=M),
    "fr-M": functools.partial(fr.features_replay, microbatches=M),
    "ddg-M": functools.partial(fr.ddg, microbatches=M),
    "fr-stashed": functools.partial(fr.features_replay, microbatches=2, replay_weights="stashed"),
}


def dni(stages, loss_fn, optimizer):
    return fr.dni(stages, loss_fn, optimizer, fr.models.synthesizer(), optax.sgd(1e-3))


@pytest.fixture(autouse=True)
def quick_collection():
    """What is alive before a test is left out of its many garbage collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def squared_error(y, z):
    return jnp.mean((y - z) ** 2)


def used_up(make):
    """Weak references to what a user made for a network, after all of the library has seen it."""
    tables = [jnp.arange(3000.0) + i for i in range(3)]

    def apply(params, state, x, *, key=None, train=True):
        return x * params[None] + tables[0][None, :5], state

    layers = [fr.Stage(lambda key, x: (tables[0][:5], ()), apply), fr.from_linen(nn.Dense(3, name="of_this_test"))]
    loss_fn = lambda y, z: jnp.mean((y - z) ** 2) + tables[1][0]
    optimizer = optax.scale_by_schedule(lambda count: -tables[2][count])  # tests share optax.sgd
    algorithm = make([layers[0], fr.chain(*layers)], loss_fn, optimizer)
    batch = fr.Batch(np.ones((6, 5), np.float32), np.ones((6, 3), np.float32))
    state = algorithm.init(jax.random.key(0), batch)
    for _ in range(3):
        state, _ = algorithm.step(state, batch)
    fr.layer_flops(layers, batch.inputs)
    algorithm.predict(state, batch.inputs)
    assert fr.from_linen(nn.Dense(3, name="of_this_test")).apply is layers[1].apply
    return [weakref.ref(one) for one in (*tables, layers[1].init, layers[1].apply, algorithm.step)]


@pytest.mark.parametrize(
    "method", ["fr", "ddg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bp", "fr-M", "dni"))]
)
def test_what_a_network_closes_over_dies_with_its_algorithm(method):
    """Tables of a stage, the loss and the optimizer, and the functions that they were compiled into."""
    gone = used_up(dni if method == "dni" else METHODS[method])
    gc.collect()
    assert [one() for one in gone] == [None] * 6


@pytest.fixture(scope="module")
def make(naive):
    def make(method, devices, donate):
        stages = [naive.dense(width).stage for width in WIDTHS[1:]]
        placement = fr.placement(K, jax.devices()[:devices])
        return METHODS[method](stages, squared_error, optax.adam(0.1), placement=placement, donate=donate)

    return make


@pytest.fixture(scope="module")
def get(make):
    """As ``make``; who asks again gets the same algorithm, and its compiled functions."""
    return functools.cache(make)


def new_batch(t):
    rng = np.random.default_rng(t)
    return fr.Batch(*(rng.uniform(-1, 1, (B, width)).astype(np.float32) for width in (WIDTHS[0], WIDTHS[-1])))


def live():
    gc.collect()
    return jax.live_arrays()


def shapes(arrays):
    """How many arrays there are of each shape, by device."""
    return Counter((next(iter(array.devices())).id, array.shape) for array in arrays)


def sizes(arrays):
    """Bytes by device."""
    found = Counter()
    for array in arrays:
        found[f"cpu:{next(iter(array.devices())).id}"] += array.nbytes
    return found


@pytest.fixture
def count_new():
    """Bytes, or shapes, of the arrays that are alive now and were not before the test."""
    before = {id(array): array for array in live()}  # held, so that no other array is given the same id
    return lambda measure: measure([array for array in live() if id(array) not in before])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("devices", [1, K])
def test_features_replay_keeps_what_its_equations_need(get, count_new, devices, donate):
    """Module k: K-k inputs, one delta. Weights, and Adam's two moments of them."""
    algorithm = get("fr", devices, donate)
    state = algorithm.init(jax.random.key(1), new_batch(0))
    sizes = []
    for t in range(5 * K):
        state, info = algorithm.step(state, new_batch(t))
        jax.block_until_ready((state.params, info))
        sizes.append(count_new(lambda arrays: sum(array.nbytes for array in arrays)))
    assert len(set(sizes[K:])) == 1 and max(sizes) == sizes[-1]
    found, expected = count_new(shapes), Counter()
    for k in range(1, K + 1):
        device = (k - 1) % devices
        expected[device, (B, WIDTHS[k - 1])] += K - k
        expected[device, (B, WIDTHS[k])] += k < K
        expected[device, (WIDTHS[k - 1], WIDTHS[k])] += 3
    assert {key: found[key] for key in expected} == dict(expected)
    assert not any(shape[:1] == (B,) for device, shape in set(found) - set(expected))


@pytest.mark.parametrize("donate", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("method", ["bp", "ddg", "gpipe"])  # features replay: the test above
def test_nothing_grows(get, count_new, method, donate):
    algorithm = get(method, K, donate)
    state = algorithm.init(jax.random.key(1), new_batch(0))
    sizes = []
    for t in range(3 * K):
        state, _ = algorithm.step(state, new_batch(t))
        jax.block_until_ready(state.params)
        sizes.append(count_new(lambda arrays: sum(array.nbytes for array in arrays)))
    assert len(set(sizes[K:])) == 1


@pytest.fixture
def calls_of(monkeypatch, count_new):
    """``(algorithm, state, batch) -> calls`` of one step: ``(function, bytes by device, shapes by device)`` alive then.

    ``algorithm`` must be made after this. Its other steps are not looked at, since every look collects garbage.
    """
    seen, looking = [], False

    def spied(name, make):
        def make_spied(*args, **kwargs):
            function = make(*args, **kwargs)

            def call(*args):
                if looking and not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
                    seen.append((name, *count_new(lambda arrays: (sizes(arrays), shapes(arrays)))))
                return function(*args)

            return call

        return make_spied

    for name in FUNCTIONS:
        room = _training if name == "train" else steps
        monkeypatch.setattr(room, f"make_{name}", spied(name, getattr(room, f"make_{name}")))

    def calls_of(algorithm, state, batch):
        nonlocal looking
        gc.collect()
        gc.freeze()  # what compiling has left is not looked through either
        looking = True
        algorithm.step(state, batch)
        looking = False
        return seen

    return calls_of


@pytest.mark.parametrize(
    ("devices", "donate"),
    [(1, False), (K, True), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, True), (K, False)))],
)
@pytest.mark.parametrize("method", METHODS)
def test_inside_a_step_nothing_outlives_its_last_use(make, calls_of, method, devices, donate):
    """At every call: exactly what a later call or the caller still needs, as found by tracing the step."""
    algorithm = make(method, devices, donate)
    batch = jax.device_put(new_batch(0), jax.devices()[0])
    state = algorithm.init(jax.random.key(1), batch)
    for _ in range(K + 1):
        state, info = algorithm.step(state, jax.tree.map(jnp.copy, batch))
    del info
    calls = calls_of(algorithm, state, batch)
    expected = [call for call in step_memory(algorithm, batch).calls if call.name in FUNCTIONS]
    assert [name for name, _, _ in calls] == [call.name for call in expected]
    surplus = [
        (call.name, call.device, live[call.device] - call.live)
        for (_, live, _), call in zip(calls, expected, strict=True)
    ]
    assert surplus == [(call.name, call.device, 0) for call in expected]


@pytest.mark.parametrize("method", ["bp", "gpipe"])
def test_residuals_hold_no_weights(make, calls_of, method):
    """One array of the shape of module k's weights, and Adam's moments, however many VJPs are waiting."""
    algorithm = make(method, K, True)
    batch = new_batch(0)
    state = algorithm.init(jax.random.key(1), batch)
    pulls = [found for name, _, found in calls_of(algorithm, state, batch) if name == "pull"]
    assert len(pulls) == (K - 1) * (M if method == "gpipe" else 1)
    for k in range(K - 1):
        sums = method == "gpipe" and k == K - 2  # the first stage to go backward
        assert pulls[0][k, (WIDTHS[k], WIDTHS[k + 1])] == 3 + sums


def test_ddg_holds_old_weights_without_biases(get, count_new):
    algorithm = get("ddg", K, True)
    state = algorithm.init(jax.random.key(1), new_batch(0))
    for t in range(2 * K):
        state, _ = algorithm.step(state, new_batch(t))
    found = count_new(shapes)
    # Module 1 needs no gradient of its input, and no weights for its VJP.
    assert [found[k, (WIDTHS[k], WIDTHS[k + 1])] for k in range(K)] == [3, 3 + 1, 3]
    assert [found[k, (WIDTHS[k + 1],)] for k in range(K)] == [3, 3, 3]
