"""NNX modules as stages, against the same network in NNX's own training loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fr_jax as fr
from fr_jax.training.checkpoints import Checkpoints

LOSS = lambda y, z: jnp.mean((y - z) ** 2)
STEPS = 20
OPTIMIZER = optax.sgd(0.02, momentum=0.9)  # Adam would divide noise by noise: no bias before a batch norm matters


class Block(nnx.Module):
    """Batch norm, dropout twice in one stream's forks, and a list."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(inputs, 6, rngs=rngs), nnx.Linear(6, outputs, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(0.3, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)])

    def __call__(self, x):
        h = self.drops[0](nnx.relu(self.norm(self.layers[0](x))))
        return self.layers[1](self.drops[1](h))


SIZES = ((4, 5), (5, 3), (3, 2))
MAKERS = [lambda rngs, sizes=sizes: Block(*sizes, rngs=rngs) for sizes in SIZES]


def batch(t: int) -> fr.Batch:
    x, y = jax.random.split(jax.random.key(100 + t))
    return fr.Batch(jax.random.normal(x, (8, 4)), jax.random.normal(y, (8, 2)))


def seed(module: nnx.Module, key: jax.Array) -> None:
    """The documented rule: stream i begins at ``fold_in(key, i)``."""
    streams = [one for _, one in nnx.iter_graph(module) if isinstance(one, nnx.RngStream)]
    paths = [path for path, one in nnx.iter_graph(module) if isinstance(one, nnx.RngStream)]
    for i, (_, stream) in enumerate(sorted(zip(paths, streams, strict=True), key=lambda pair: pair[0])):
        stream.key.set_value(jax.random.fold_in(key, i))
        stream.count.set_value(jnp.zeros((), jnp.uint32))


def own_loop(blocks: list[Block], keys: list[jax.Array]) -> list[jax.Array]:
    """The losses of NNX's own training, in which step t's dropout comes from ``keys[t]``."""
    network = nnx.Sequential(*blocks)
    optimizer = nnx.Optimizer(network, OPTIMIZER, wrt=nnx.Param)
    losses = []
    network.train()
    for t, key in enumerate(keys):
        for i, block in enumerate(blocks):
            seed(block, jax.random.fold_in(key, i))
        inputs, targets, _ = batch(t)
        loss, grads = nnx.value_and_grad(lambda net, x=inputs, z=targets: LOSS(net(x), z))(network)
        optimizer.update(network, grads)
        losses.append(loss)
    network.eval()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_as_in_nnx(given):
    """Twenty steps with momentum, batch norm and dropout; weights drawn from the key, or those of modules."""
    blocks = [make(nnx.Rngs(7)) for make in MAKERS]
    method = fr.backprop([fr.from_nnx(one) for one in (blocks if given else MAKERS)], LOSS, OPTIMIZER)
    state = method.init(jax.random.key(0), batch(0))
    if not given:
        for k, block in enumerate(blocks):
            weights = nnx.state(block, nnx.Param)
            nnx.replace_by_pure_dict(weights, state.params[k])
            nnx.update(block, weights)
    losses, keys = [], []
    for t in range(STEPS):
        keys.append(state.streams[0].at())
        state, info = method.step(state, batch(t))
        losses.append(info.loss)
    np.testing.assert_allclose(losses, own_loop(blocks, keys), rtol=2e-5)
    for k, block in enumerate(blocks):
        chex.assert_trees_all_close(
            state.params[k], nnx.to_pure_dict(nnx.state(block, nnx.Param)), rtol=1e-4, atol=2e-5
        )
        chex.assert_trees_all_close(
            state.model_state[k], nnx.to_pure_dict(nnx.state(block, nnx.BatchStat)), rtol=1e-4, atol=2e-5
        )
    inputs = batch(50).inputs
    np.testing.assert_allclose(method.predict(state, inputs), nnx.Sequential(*blocks)(inputs), rtol=2e-4, atol=2e-5)


def test_a_module_keeps_its_weights_and_is_not_changed():
    module = Block(4, 2, rngs=nnx.Rngs(1))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
    stages = [fr.from_nnx(module)]
    method = fr.features_replay(stages, LOSS, optax.sgd(0.1), donate=True)
    state = method.init(jax.random.key(0), batch(0))
    chex.assert_trees_all_equal(state.params[0], nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    state, _ = method.step(state, batch(0))
    chex.assert_trees_all_equal(before, nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))


def test_masks_differ_between_layers_and_come_back_with_the_key():
    stage = fr.from_nnx(lambda rngs: nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)))
    x = jnp.ones((100,))
    params, state = stage.init(jax.random.key(0), x)
    y, _ = stage.apply(params, state, x, key=jax.random.key(1))
    again, _ = stage.apply(params, state, x, key=jax.random.key(1))
    other, _ = stage.apply(params, state, x, key=jax.random.key(2))
    chex.assert_trees_all_equal(y, again)
    assert (y != other).any() and {*np.unique(y).tolist()} == {0.0, 4.0} and 5 < (y > 0).sum() < 45
    chex.assert_trees_all_equal(stage.apply(params, state, x, train=False)[0], x)


def test_a_mode_that_the_call_names():
    class Mode(nnx.Module):
        def __call__(self, x, *, train: bool, scale: float = 1.0):
            return scale * (x if train else -x)

    stage = fr.from_nnx(Mode(), scale=3.0)
    assert stage.apply({}, {}, 1.0)[0] == 3.0 and stage.apply({}, {}, 1.0, train=False)[0] == -3.0


def test_a_state_is_saved_and_restored(tmp_path):
    stages = [fr.from_nnx(make) for make in MAKERS]
    method = fr.features_replay(stages, LOSS, optax.adam(1e-2))
    state = method.init(jax.random.key(0), batch(0))
    for t in range(3):
        state, _ = method.step(state, batch(t))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        restored = checkpoints.restore(method.init(jax.random.key(1), batch(0))).state
    chex.assert_trees_all_equal(method.step(state, batch(3))[0].params, method.step(restored, batch(3))[0].params)


@pytest.mark.parametrize("wrong", [nnx.Linear, 3])
def test_what_is_no_module_is_refused(wrong):
    with pytest.raises(ValueError, match="must be an NNX module, such as "):
        fr.from_nnx(wrong)
