"""Clipping by the norm of the whole network's gradient: ``optax.clip_by_global_norm`` of a network that is not cut."""

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


@pytest.fixture
def layers(naive):
    return [layer.stage for layer in (naive.dense(5), naive.batch_norm(), naive.dense(4), naive.dense(2))]


EXACT = {  # and cuts, devices, devices of a stage, micro-batches
    "bp": (fr.backprop, (1, 3), 1, 1, 1),
    "bp, one stage": (fr.backprop, (), 1, 1, 1),
    "bp, devices": (fr.backprop, (1, 3), 3, 1, 1),
    "bp, devices, M = 3": (fr.backprop, (2,), 2, 1, 3),
    "gpipe, data parallel": (functools.partial(fr.gpipe, schedule="1f1b"), (1, 3), 6, 2, 3),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("donate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exact_methods_clip_as_an_uncut_network(naive, layers, make_batches, case, donate):
    make, cuts, devices, data_parallel, M = EXACT[case]
    placement = fr.placement(len(cuts) + 1, jax.devices()[:devices], data_parallel)
    options = {"placement": placement, "donate": donate, "microbatches": M, "return_grads": True}
    batches, G = make_batches(5, examples=12), 0.3
    cut = make(fr.partition(layers, cuts), naive.squared_error, optax.adam(0.05), global_clip=G, **options)
    optimizer = optax.chain(optax.clip_by_global_norm(G), optax.adam(0.05))
    whole = fr.backprop([fr.chain(*layers)], naive.squared_error, optimizer, microbatches=M, return_grads=True)
    state, expected = cut.init(KEY, batches[0]), whole.init(KEY, batches[0])
    for batch in batches:
        state, info = cut.step(state, batch)
        expected, of_whole = whole.step(expected, batch)
        chex.assert_trees_all_close(fr.layer_params(state), fr.layer_params(expected), **close)
        np.testing.assert_allclose(info.loss, of_whole.loss, **close)
        norms = [info.metrics[f"gradient_norm/{k + 1}"] for k in range(len(cuts) + 1)]
        assert np.linalg.norm(norms) > G  # they are reported as they were
        np.testing.assert_allclose(np.linalg.norm(norms), of_whole.metrics["gradient_norm/1"], **close)
        grads = [layer for stage in info.grads for layer in stage]
        chex.assert_trees_all_close(tuple(jax.device_get(grads)), of_whole.grads[0], **close)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("method", "M"),
    [
        (fr.features_replay, 1),
        (fr.ddg, 2),
        pytest.param(fr.features_replay, 2, marks=pytest.mark.slow),
        pytest.param(fr.ddg, 1, marks=pytest.mark.slow),
        pytest.param(fr.pipedream_2bw, 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("devices", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_late_methods_take_the_newest_norms_that_they_know(naive, layers, make_batches, method, M, devices):
    """Each update, from the gradients that the step reports and the norms of the step before."""
    G, rate, placement = 0.3, 0.1, fr.placement(3, jax.devices()[:devices])
    algorithm = method(
        fr.partition(layers, (1, 3)),
        naive.squared_error,
        optax.sgd(rate),
        microbatches=M,
        placement=placement,
        return_grads=True,
        global_clip=G,
    )
    batches = make_batches(6, examples=12)
    state, squares, clipped = algorithm.init(KEY, batches[0]), np.zeros(3), 0
    for batch in batches:
        old, (state, info) = state, algorithm.step(state, batch)
        grads = jax.device_get(info.grads)
        own = np.array([sum((leaf**2).sum() for leaf in jax.tree.leaves(g)) for g in grads])
        norms = np.sqrt(own + squares.sum() - squares)
        for k, g in enumerate(grads):
            if g is not None:
                factor = min(1, G / norms[k])
                clipped += factor < 1
                moved = jax.tree.map(lambda w, g, f=factor: w - rate * f * g, jax.device_get(old.params[k]), g)
                chex.assert_trees_all_close(state.params[k], moved, **close)
        squares = own
        assert jax.tree.structure(state._replace(step=0)) == jax.tree.structure(old._replace(step=0))
    assert clipped > 12


def test_clipping_waits_for_no_device_and_compiles_once(naive, layers, make_batches, compilations, no_waiting):
    batches = make_batches(6)
    algorithm = fr.features_replay(
        fr.partition(layers, (1, 3)), naive.squared_error, optax.adam(0.1), global_clip=1.0, donate=True
    )
    state = algorithm.init(KEY, batches[0])
    for t, batch in enumerate(batches):
        compilations.clear()
        state, _ = algorithm.step(state, batch)
        assert t < 4 or not compilations


@pytest.mark.parametrize("bad", [-1.0, float("inf"), "1"])
def test_what_is_no_norm_is_refused(naive, layers, bad):
    with pytest.raises(
        ValueError, match=r"global_clip = .* was given; it must be a number, 0 or more: the largest norm"
    ):
        fr.backprop(layers, naive.squared_error, optax.sgd(0.1), global_clip=bad)


@pytest.mark.filterwarnings("ignore:this network keeps weights in bfloat16")
def test_half_precision(naive):
    layers = [naive.dense(3).stage, naive.dense(2).stage]
    batch = fr.Batch(100 * jnp.ones((6, 3), jnp.bfloat16), jnp.ones((6, 2), jnp.bfloat16))
    for method in (fr.backprop, fr.features_replay):
        algorithm = method(layers, naive.squared_error, optax.sgd(0.1), global_clip=0.1)
        with jax.numpy_dtype_promotion("strict"):
            state = algorithm.init(KEY, batch)
            state, _ = algorithm.step(state, batch)
        assert jax.tree.leaves(state.params)[0].dtype == jnp.bfloat16
