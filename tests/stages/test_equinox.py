"""Equinox modules as stages, against the same network in Equinox's own training loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.training.checkpoints import Checkpoints

eqx = pytest.importorskip("equinox")

LOSS = lambda y, z: jnp.mean((y - z) ** 2)
STEPS = 20
OPTIMIZER = optax.sgd(0.005, momentum=0.9)  # Adam would divide noise by noise: no bias before a batch norm matters


class Block(eqx.Module):
    """Batch norm and dropout between two linear layers."""

    layers: list
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    scale: jax.Array  # whole numbers are not trained

    def __init__(self, inputs: int, outputs: int, *, key: jax.Array):
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(inputs, 6, key=first), eqx.nn.Linear(6, outputs, key=second)]
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", momentum=0.9, mode="batch")
        self.drop = eqx.nn.Dropout(0.3)
        self.scale = jnp.arange(1, 7)

    def __call__(self, x, state, *, key=None):
        h, state = self.norm(self.layers[0](x), state)
        return self.layers[1](self.drop(self.scale * jax.nn.relu(h), key=key)), state


SIZES = ((4, 5), (5, 3), (3, 2))
MAKERS = [lambda key, sizes=sizes: eqx.nn.make_with_state(Block)(*sizes, key=key) for sizes in SIZES]


def batch(t: int) -> fr.Batch:
    x, y = jax.random.split(jax.random.key(100 + t))
    return fr.Batch(jax.random.normal(x, (8, 4)), jax.random.normal(y, (8, 2)))


def forward(blocks, states, x, key):
    """A mini-batch through all blocks; block i draws from ``fold_in(key, i)``, a key per example."""
    moved = []
    for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
        keys = None if key is None else jax.random.split(jax.random.fold_in(key, i), len(x))
        run = lambda x, state, key, block=block: block(x, state, key=key)
        x, state = jax.vmap(run, (0, None, None if key is None else 0), (0, None), axis_name="batch")(x, state, keys)
        moved.append(state)
    return x, moved


def own_loop(blocks, states, keys):
    opt_state, losses = OPTIMIZER.init(eqx.filter(blocks, eqx.is_inexact_array)), []

    @eqx.filter_value_and_grad(has_aux=True)
    def loss_fn(blocks, states, batch, key):
        y, states = forward(blocks, states, batch.inputs, key)
        return LOSS(y, batch.targets), states

    for t, key in enumerate(keys):
        (loss, states), grads = loss_fn(blocks, states, batch(t), key)
        updates, opt_state = OPTIMIZER.update(grads, opt_state)
        blocks = eqx.apply_updates(blocks, updates)
        losses.append(loss)
    return blocks, states, losses


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_as_in_equinox(given):
    """Twenty steps with momentum, batch norm and dropout; weights drawn from the key, or those of modules."""
    made = [make(jax.random.key(7)) for make in MAKERS]
    stages = [fr.from_equinox(*one) for one in made] if given else [fr.from_equinox(make) for make in MAKERS]
    method = fr.backprop(stages, LOSS, OPTIMIZER)
    state = method.init(jax.random.key(0), batch(0))
    blocks = [eqx.combine(params, block) for params, (block, _) in zip(state.params, made, strict=True)]
    losses, keys = [], []
    for t in range(STEPS):
        keys.append(state.streams[0].at())
        state, info = method.step(state, batch(t))
        losses.append(info.loss)
    blocks, states, expected = own_loop(blocks, [one for _, one in made], keys)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    chex.assert_trees_all_close(list(state.params), eqx.filter(blocks, eqx.is_inexact_array), rtol=1e-4, atol=2e-5)
    chex.assert_trees_all_close([kept for _, kept in state.model_state], states, rtol=1e-4, atol=2e-5)
    inputs = batch(50).inputs
    outputs, _ = forward(eqx.nn.inference_mode(blocks), states, inputs, None)
    np.testing.assert_allclose(method.predict(state, inputs), outputs, rtol=2e-4, atol=2e-5)


def test_layers_of_the_framework():
    """Without state, without a key; each example draws a mask of its own."""
    stages = [fr.from_equinox(lambda key: eqx.nn.Linear(4, 50, key=key)), fr.from_equinox(eqx.nn.Dropout(0.5))]
    network, x = fr.chain(*stages), jnp.ones((3, 4))
    params, state = network.init(jax.random.key(0), x)
    y, _ = network.apply(params, state, x, key=jax.random.key(1))
    exact, _ = network.apply(params, state, x, train=False)
    chex.assert_trees_all_equal(exact[0], exact[1])
    assert ((y == 0).sum(1) > 5).all() and not (y[0] == y[1]).all()
    np.testing.assert_allclose(y[y != 0], 2 * exact[y != 0], rtol=1e-6)


def test_a_module_keeps_its_weights():
    module = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(3))
    before = jax.tree.map(np.array, eqx.filter(module, eqx.is_array))
    method = fr.features_replay([fr.from_equinox(module)], LOSS, optax.sgd(0.1), donate=True)
    state = method.init(jax.random.key(0), batch(0))
    chex.assert_trees_all_equal(jax.tree.leaves(state.params[0]), jax.tree.leaves(before))
    state, _ = method.step(state, batch(0))
    chex.assert_trees_all_equal(before, eqx.filter(module, eqx.is_array))
    trained = eqx.combine(state.params[0], module)  # without this library
    np.testing.assert_allclose(
        jax.vmap(trained)(batch(1).inputs), method.predict(state, batch(1).inputs), rtol=1e-5, atol=1e-6
    )


def test_a_state_is_saved_and_restored(tmp_path):
    method = fr.features_replay([fr.from_equinox(make) for make in MAKERS], LOSS, optax.adam(1e-2))
    state = method.init(jax.random.key(0), batch(0))
    for t in range(3):
        state, _ = method.step(state, batch(t))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        restored = checkpoints.restore(method.init(jax.random.key(1), batch(0))).state
    chex.assert_trees_all_equal(method.step(state, batch(3))[0].params, method.step(restored, batch(3))[0].params)


@pytest.mark.parametrize("wrong", [eqx.nn.Linear, 3])
def test_what_is_no_module_is_refused(wrong):
    with pytest.raises(ValueError, match="must be an Equinox module, such as "):
        fr.from_equinox(wrong)
