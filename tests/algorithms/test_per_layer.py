"""Optimizers that no cut changes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms._layers import carry_over

KEY = jax.random.key(0)
close = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture
def layers(naive):
    return [naive.dense(width).stage for width in (3, 3, 2)]


def labelled(params):
    """For the whole network at once: the first layer is frozen, biases and the last layer have SGD."""

    def label(path, w):
        layer, name = path
        return "frozen" if layer.idx == 0 else "sgd" if layer.idx == 2 or name.key == "b" else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def trained(layers, batches, cuts, optimizer, method=fr.backprop):
    stages = fr.partition(layers, cuts) if cuts != "bare" else layers
    algorithm = method(stages, lambda y, z: jnp.mean((y - z) ** 2), optimizer(stages))
    state = algorithm.init(KEY, batches[0])
    for batch in batches:
        state, _ = algorithm.step(state, batch)
    return algorithm, state


@pytest.mark.usefixtures("x64")
def test_labels_rates_and_noise_by_layer_are_those_of_every_cut(layers, make_batches):
    batches = make_batches(4)
    whole = fr.backprop([fr.chain(*layers)], lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1))
    start, _ = fr.layer_params(whole.init(KEY, batches[0]))
    labels = labelled(start)
    kinds = {"frozen": optax.set_to_zero(), "sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(0.01)}

    def optimizer(stages):
        noise = {0: optax.identity(), 1: optax.add_noise(0.1, 0.5, 7), 2: optax.add_noise(0.2, 0.5, 7)}
        return fr.per_layer(lambda i: optax.chain(noise[i], optax.multi_transform(kinds, labels[i])), stages)

    _, expected = trained(layers, batches, (), optimizer)
    params, _ = fr.layer_params(expected)
    chex.assert_trees_all_equal(params[0], start[0])
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (params[1:], start[1:])), strict=True))
    for cuts in ((2,), "bare"):
        _, state = trained(layers, batches, cuts, optimizer)
        chex.assert_trees_all_close(fr.layer_params(state)[0], params, **close)


def test_stages_draw_noise_of_their_own(layers, make_batches):
    """At a learning rate of 1 and a gradient of 0, the first update is the noise; that of one stage is optax's."""
    batch, optimizer = make_batches(1)[0], optax.chain(optax.scale(0.0), optax.add_noise(1.0, 0.0, 3), optax.sgd(1.0))
    algorithm = fr.backprop(layers[:2], lambda y, z: jnp.mean(y), optimizer)
    old = algorithm.init(KEY, batch)
    new, _ = algorithm.step(old, batch)
    noise = jax.tree.map(lambda a, b: np.ravel(b - a), old.params, new.params)
    assert abs(np.corrcoef(noise[0]["W"], noise[1]["W"])[0, 1]) < 0.7
    zeros = jax.tree.map(jnp.zeros_like, old.params[0])
    expected, _ = optimizer.update(zeros, optimizer.init(zeros), zeros)
    chex.assert_trees_all_close(noise[0], jax.tree.map(np.ravel, expected), rtol=1e-5, atol=1e-6)


def test_states_are_carried_over_to_other_cuts(layers, make_batches):
    batches = make_batches(4)
    optimizer = lambda stages: fr.per_layer(lambda i: optax.adam(0.01) if i % 2 else optax.sgd(0.1, 0.9), stages)
    algorithm, state = trained(layers, batches, "bare", optimizer)
    other, fresh = trained(layers, batches[:1], (2,), optimizer)
    moved = carry_over(state, fresh)
    for batch in batches:
        state, _ = algorithm.step(state, batch)
        moved, _ = other.step(moved, batch)
    chex.assert_trees_all_close(fr.layer_params(moved)[0], fr.layer_params(state)[0], rtol=1e-5, atol=1e-6)


def test_the_remedies_of_late_methods_wrap_them(layers, make_batches):
    optimizer = lambda stages: fr.staleness.shrink_gradients(
        fr.per_layer(lambda i: optax.adam(0.01), stages), 0.5, len(stages)
    )
    method = lambda *arguments: fr.features_replay(*arguments, weight_prediction=1.0, global_clip=0.1)
    _, state = trained(layers, make_batches(5), (2,), optimizer, method)
    assert np.isfinite(jax.tree.leaves(fr.layer_params(state)[0])[0]).all()


def test_what_is_no_optimizer_is_refused(layers):
    with pytest.raises(ValueError, match=r"per_layer\(\) was given 0\.1 for layer 2; make\(i\) must return an optax"):
        fr.per_layer(lambda i: 0.1 if i == 2 else optax.sgd(0.1), layers)
    with pytest.raises(ValueError, match="stage 1 is 'dense'"):
        fr.per_layer(lambda i: optax.sgd(0.1), ["dense"])
