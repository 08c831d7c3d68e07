import functools
import math
from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import fr_jax as fr
import fr_jax.data as fr_data
from fr_jax._arrays import put
from fr_jax._placement import data_parallel_size, replicated

DEVICES = jax.devices()


def ids(shardings):
    return [sorted(device.id for device in sharding.device_set) for sharding in shardings]


@pytest.mark.parametrize(
    ("K", "devices", "data_parallel", "expected"),
    [
        (3, 8, 1, [[0], [1], [2]]),
        (1, 8, 1, [[0]]),
        (5, 2, 1, [[0], [1], [0], [1], [0]]),  # round robin
        (2, 1, 1, [[0], [0]]),
        (2, 4, 2, [[0, 1], [2, 3]]),
        (3, 5, 2, [[0, 1], [2, 3], [0, 1]]),  # the fifth device makes no pair
        (2, 4, 4, [[0, 1, 2, 3]] * 2),
    ],
)
def test_stages_get_groups_of_devices_in_turn(K, devices, data_parallel, expected):
    shardings = fr.placement(K, DEVICES[:devices], data_parallel)
    assert ids(shardings) == expected
    assert {type(s) for s in shardings} == {SingleDeviceSharding if data_parallel == 1 else NamedSharding}
    assert [data_parallel_size(s) for s in shardings] == [data_parallel] * K


def test_all_devices_are_the_default():
    assert ids(fr.placement(len(DEVICES))) == [[device.id] for device in DEVICES]


@pytest.mark.parametrize(
    ("K", "devices", "data_parallel", "said"),
    [
        (0, 2, 1, "K = 0; K must be at least 1"),
        (2, 2, 3, r"data_parallel = 3 .*with 2 device\(s\) it can be 1 to 2. Use fewer, or give JAX more devices"),
        (2, 2, 0, "data_parallel = 0 .*it can be 1 to 2"),
    ],
)
def test_impossible_placements_are_refused(K, devices, data_parallel, said):
    with pytest.raises(ValueError, match=said):
        fr.placement(K, DEVICES[:devices], data_parallel)


def test_weights_are_split_over_several_devices_only():
    with pytest.raises(ValueError, match=r"shard_params = True with data_parallel = 1 .* from 2 to the 4 device"):
        fr.placement(2, DEVICES[:4], shard_params=True)
    here = replicated(fr.placement(1, DEVICES[:4], 4, shard_params=True)[0])
    whole = {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(3), "count": jnp.ones(())}
    shards = {name: x.addressable_shards[0].data.shape for name, x in put(whole, here).items()}
    assert shards == {"kernel": (8, 3), "bias": (3,), "count": ()}


def test_no_placement_leaves_arrays_where_they_are():
    assert (replicated(None), data_parallel_size(None)) == (None, 1)
    x = jnp.ones(2)
    assert put(x, None) is x


def mesh(*shape):
    devices = DEVICES[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], (AxisType.Auto,) * len(shape), devices=devices)


@pytest.mark.parametrize(
    ("spec", "D"),
    [(("data",), 2), (("model",), 4), ((("data", "model"),), 8), ((), 1), ((None, "data"), 1), (("data", "model"), 2)],
)
def test_the_parts_of_a_batch_are_counted_and_not_the_devices(spec, D):
    sharding = NamedSharding(mesh(2, 4), PartitionSpec(*spec))
    assert data_parallel_size(sharding) == D
    assert sharding.shard_shape((8, 8))[0] == 8 // D


@functools.cache
def algorithm_on(placement):
    stages = fr.partition(fr.models.mlp(depth=2, width=8, dropout_rate=0.5), (1,))
    return fr.features_replay(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.adam(0.1), placement=placement)


def trained(placement, context=None):
    """Three steps of a small network, and its prediction for as many rows as no number of devices divides."""
    algorithm, rng = algorithm_on(placement), np.random.default_rng(0)
    batches = [fr.Batch(*(rng.standard_normal((6, n)).astype(np.float32) for n in (5, 10))) for _ in range(3)]
    with jax.set_mesh(context) if context else nullcontext():
        state = algorithm.init(jax.random.key(0), batches[0])
        for batch in batches:
            state, info = algorithm.step(state, batch)
        return state, info, algorithm.predict(state, batches[0].inputs[:5])


def test_a_mesh_of_two_axes_trains_as_one_axis_does():
    """The batch of 6 is split over 2 of 4 devices, and copied along the other axis."""
    one = trained(fr.placement(2, DEVICES[:2], data_parallel=2))
    two = trained((NamedSharding(mesh(2, 2), PartitionSpec("data")),) * 2)
    chex.assert_trees_all_close(
        *(jax.tree.map(np.asarray, (r[0].params, r[2])) for r in (one, two)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("placed", [False, True], ids=["default", "placed"])
def test_a_mesh_around_the_library_changes_nothing(placed, axis_type):
    placement = fr.placement(2, DEVICES[2:4]) if placed else None
    context = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    inside, plain = trained(placement, context), trained(placement)  # in this order: it is traced inside
    chex.assert_trees_all_equal(plain, inside)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(inside), strict=True):
        assert getattr(a, "sharding", None) == getattr(b, "sharding", None)


def test_a_mesh_around_the_input_pipeline_changes_nothing():
    dataset = fr_data.load("synthetic")
    batch = fr_data.input_pipeline(dataset, 6, seed=0).train_batch(0)
    with jax.set_mesh(mesh(8)):
        pipeline = fr_data.input_pipeline(dataset, 6, seed=0)
        inside, _ = pipeline.train_batch(0), next(pipeline.test_batches())
    chex.assert_trees_all_equal(batch, inside)
    assert inside.inputs.sharding == batch.inputs.sharding
