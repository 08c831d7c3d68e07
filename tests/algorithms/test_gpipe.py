import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import gpipe as method
from fr_jax.algorithms._microbatches import make_split

STEPS = 4
close = {"rtol": 1e-10, "atol": 1e-12}


def naive_gpipe(naive, modules, updates, start, batches, M):
    """Microbatch by microbatch, in NumPy; M = 1 is back-propagation with the whole batch."""
    w, w_state = jax.tree.map(np.asarray, (list(start.params), list(start.model_state)))
    keys = naive.layer_keys(modules, start)
    for t, batch in enumerate(batches):
        microbatches = []
        for m in range(M):
            h, targets, pulls, grads = np.asarray(batch.inputs)[m::M], np.asarray(batch.targets)[m::M], [], []
            for k, module in enumerate(modules):
                h, w_state[k], pull = naive.forward(module, w[k], w_state[k], h, keys(k, t * M + m))
                pulls.append(pull)
            delta = 2 * (h - targets) / len(h)
            for pull in reversed(pulls):
                module_grads, delta = pull(delta)
                grads.insert(0, module_grads)
            microbatches.append((tuple(grads), naive.squared_error(h, targets), np.abs(h).max()))
        grads, loss, largest = jax.tree.map(lambda *leaves: sum(leaves) / M, *microbatches)
        w = [update(*pair) for update, pair in zip(updates, zip(w, grads, strict=True), strict=True)]
        yield tuple(w), tuple(w_state), grads, loss, largest


def assert_follows(states, infos, expected):
    for state, info, (w, w_state, grads, loss, _) in zip(states[1:], infos, expected, strict=True):
        chex.assert_trees_all_close(state.params, w, **close)
        chex.assert_trees_all_close(state.model_state, w_state, **close)
        chex.assert_trees_all_close(info.grads, grads, **close)
        np.testing.assert_allclose(info.loss, loss, **close)
        for k, module_grads in enumerate(grads, start=1):
            norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(module_grads)))
            np.testing.assert_allclose(info.metrics[f"gradient_norm/{k}"], norm, **close)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "M", "optimizer"),
    [
        (1, 3, "adam"),
        (2, 2, "nesterov"),
        (3, 3, "adam"),
        (4, 2, "sgd"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1, "sgd"), (4, 6, "nesterov"))),
    ],
)
def test_update_is_that_of_the_whole_batch(naive, make_batches, run, K, M, optimizer):
    modules = [(naive.dense(4),), (naive.dense(5),), (naive.dense(3),)][: K - 1] + [(naive.dense(2),)]
    ours, theirs = naive.OPTIMIZERS[optimizer]
    stages = [naive.stage(module) for module in modules]
    gpipe = fr.gpipe(stages, naive.squared_error, ours(), microbatches=M, return_grads=True)
    batches = make_batches(STEPS)
    states, infos = run(gpipe, batches)
    expected = naive_gpipe(naive, modules, [theirs() for _ in modules], states[0], batches, M=1)
    assert_follows(states, infos, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("M", "devices"), [pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)])
def test_microbatches_have_their_own_statistics_and_masks(naive, make_batches, run, M, devices):
    modules = [(naive.dense(4), naive.dropout(0.4)), (naive.batch_norm(),), (naive.dropout(0.4), naive.dense(2))]
    ours, theirs = naive.OPTIMIZERS["adam"]
    gpipe = fr.gpipe(
        [naive.stage(module) for module in modules],
        naive.squared_error,
        ours(),
        microbatches=M,
        placement=fr.placement(3, jax.devices()[:devices]),
        return_grads=True,
        metrics_fn=lambda outputs, targets: {"largest": jnp.abs(outputs).max()},
    )
    batches = make_batches(STEPS)
    states, infos = run(gpipe, batches)
    expected = list(naive_gpipe(naive, modules, [theirs() for _ in modules], states[0], batches, M))
    assert_follows(states, infos, expected)
    np.testing.assert_allclose([info.metrics["largest"] for info in infos], [e[-1] for e in expected], **close)
    assert [[int(stream.count) for stream in state.streams] for state in states] == [[t * M] * 3 for t in range(5)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_microbatch_is_backprop(naive, make_batches, run, devices):
    stages = [
        naive.stage(module)
        for module in [(naive.dense(4), naive.batch_norm()), (naive.dropout(0.4), naive.dense(3)), (naive.dense(2),)]
    ]
    shared = {
        "placement": fr.placement(3, jax.devices()[:devices]),
        "return_grads": True,
        "metrics_fn": lambda outputs, targets: {"largest": jnp.abs(outputs).max()},
    }
    one = fr.gpipe(stages, naive.squared_error, optax.adam(0.01), microbatches=1, **shared)
    plain = fr.backprop(stages, naive.squared_error, optax.adam(0.01), **shared)
    batches = make_batches(STEPS)
    (a, a_infos), (b, b_infos) = run(one, batches), run(plain, batches)
    for mine, theirs in zip(a, b, strict=True):
        streams = ([(jax.random.key_data(s.key), s.count) for s in state.streams] for state in (mine, theirs))
        chex.assert_trees_all_equal(*streams)
        chex.assert_trees_all_close(*(tuple(state._replace(streams=())) for state in (mine, theirs)), **close)
    chex.assert_trees_all_close(a_infos, b_infos, **close)


def test_each_module_may_have_its_own_optimizer(naive, make_batches, run):
    stages = [naive.dense(4).stage, naive.dense(3).stage, naive.dense(2).stage]
    rates = (0.1, 0.0, 0.2)
    gpipe = fr.gpipe(stages, naive.squared_error, [optax.sgd(r) for r in rates], microbatches=2, return_grads=True)
    (old, new), (info,) = run(gpipe, make_batches(1))
    for k, rate in enumerate(rates):
        expected = jax.tree.map(lambda w, g, rate=rate: w - rate * g, old.params[k], info.grads[k])
        chex.assert_trees_all_close(new.params[k], expected, rtol=1e-6)


@pytest.mark.parametrize("D", [1, 2])
def test_a_split_sends_nothing_between_devices(D):
    sharding = fr.placement(1, jax.devices()[:D], data_parallel=D)[0]
    x = jax.device_put(np.arange(24.0).reshape(12, 2), sharding)
    split = make_split(sharding, 3)
    for m, part in enumerate(split(x)):
        np.testing.assert_array_equal(part, np.asarray(x)[m::3])
        assert part.sharding.is_equivalent_to(sharding, 2)
    sent = r"all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
    assert not re.search(sent, split.lower(x).compile().as_text())


def test_the_search_would_see_something_sent():
    sharding = fr.placement(1, jax.devices()[:2], data_parallel=2)[0]
    x = jax.device_put(np.arange(24.0).reshape(12, 2), sharding)
    rotate = jax.jit(lambda x: jnp.roll(x, 1, axis=0), out_shardings=sharding)
    assert re.search(r"collective-permute|all-gather|all-to-all", rotate.lower(x).compile().as_text())


@pytest.mark.parametrize(
    ("schedule", "order"),
    [
        ("gpipe", "f1 f2 K f1 f2 K f1 f2 K u3 p2 p1 p2 p1 p2 u2 p1 u1"),
        ("1f1b", "f1 f2 K f1 f2 K p2 f1 f2 K u3 p2 p1 p2 u2 p1 p1 u1"),
    ],
)
def test_the_order_of_issue(naive, make_batches, schedule, order):
    """It decides the time that a step takes."""
    stages = [naive.dense(width).stage for width in (4, 3, 2)]
    setup = method.check_setup(stages, naive.squared_error, optax.sgd(0.1), microbatches=3)
    parts = method.make_parts(setup)
    issued = []

    def told(name, call):
        return lambda *args: (issued.append(name), call(*args))[1]

    numbered = lambda room, name: tuple(told(f"{name[0]}{k}", f) for k, f in enumerate(getattr(room, name), 1))
    spies = {name: numbered(parts, name) for name in ("forwards", "pulls")} | {"last": told("K", parts.last)}
    spies["shared"] = parts.shared._replace(updates=numbered(parts.shared, "updates"))
    (batch,) = make_batches(1)
    state = method.init(setup, parts, jax.random.key(0), batch, None, None)
    method.step(schedule, setup, parts._replace(**spies), state, batch)
    assert " ".join(issued) == order


def test_numpy_batches_are_welcome(naive, make_batches, run):
    gpipe = fr.gpipe([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), microbatches=2)
    batches = make_batches(2)
    a, _ = run(gpipe, batches)
    b, _ = run(gpipe, jax.tree.map(np.asarray, batches))
    chex.assert_trees_all_equal(a[-1].params, b[-1].params)


@pytest.mark.parametrize("microbatches", [0, -1, 1.5, 2.0, True, None, "2"])
def test_a_wrong_number_of_microbatches_is_refused(naive, microbatches):
    with pytest.raises(ValueError, match=f"microbatches = {microbatches!r} was given; it must be a whole number"):
        fr.gpipe([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), microbatches=microbatches)


@pytest.mark.parametrize(("M", "D", "multiple"), [(4, 1, 4), (3, 2, 6)])
def test_a_batch_that_cannot_be_split_is_refused(naive, make_batches, M, D, multiple):
    placement = fr.placement(2, jax.devices()[:D], data_parallel=D)
    stages = [naive.dense(3).stage, naive.dense(2).stage]
    gpipe = fr.gpipe(stages, naive.squared_error, optax.sgd(0.1), microbatches=M, placement=placement)
    (good,), (bad,) = make_batches(1, examples=12), make_batches(1, examples=9)
    complaint = rf"a batch of 9 examples .* microbatches = {M} .* must be a multiple of {M} \* {D} = {multiple}\."
    with pytest.raises(ValueError, match=complaint):
        gpipe.init(jax.random.key(0), bad)
    state = gpipe.init(jax.random.key(0), good)
    with pytest.raises(ValueError, match=complaint):
        gpipe.step(state, bad)
    gpipe.step(state, make_batches(1, examples=24)[0])  # nothing is in flight between steps


def test_targets_that_would_be_split_apart_from_their_inputs_are_refused(naive, make_batches):
    gpipe = fr.gpipe([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), microbatches=2)
    (batch,) = make_batches(1)
    with pytest.raises(
        ValueError, match=r"inputs of shape \(6, 3\) and targets of shape \(12,\); all must have the same number"
    ):
        gpipe.init(jax.random.key(0), batch._replace(targets=batch.targets.ravel()))


@pytest.mark.filterwarnings("ignore:this network keeps weights in bfloat16")
def test_gradients_of_half_precision_do_not_get_worse_with_more_microbatches():
    """One product, whose gradient is the mean over the examples: in bfloat16 the sums of 32 parts would lose digits."""
    B, M = 128, 32
    product = fr.Stage(
        lambda key, x: (jnp.ones((x.shape[1], 1), x.dtype), ()),
        lambda w, state, x, *, key=None, train=True: (x @ w, state),
    )
    x = np.random.default_rng(0).uniform(0.5, 1.5, (B, 4))
    batch = fr.Batch(jnp.asarray(x, jnp.bfloat16), jnp.zeros((B, 1), jnp.bfloat16))
    mean = lambda y, z: (y - z).mean()
    algorithm = fr.gpipe(product, mean, optax.sgd(0.1), microbatches=M, return_grads=True)
    state = algorithm.init(jax.random.key(0), batch)
    new, info = algorithm.step(state, batch)
    parts = [np.asarray(batch.inputs[m::M], np.float64).mean(0) for m in range(M)]
    exact = np.mean(parts, axis=0)[:, None]
    error = np.abs(np.asarray(info.grads[0], np.float64) - exact).max() / np.abs(exact).max()
    assert error < 2**-9  # half a unit in bfloat16's last place; sums in bfloat16 are off by several
    assert jax.tree.leaves(new.params)[0].dtype == jnp.bfloat16
