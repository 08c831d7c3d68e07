import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

import fr_jax as fr
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


def test_no_placement_leaves_arrays_where_they_are():
    assert (replicated(None), data_parallel_size(None)) == (None, 1)
    x = jnp.ones(2)
    assert put(x, None) is x
