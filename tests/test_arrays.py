import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax import _arrays
from fr_jax._arrays import is_readable, place, put, read, windows
from fr_jax._placement import replicated


def test_what_is_there_already_is_not_sent():
    here, there = fr.placement(2)
    x = jax.device_put(jnp.ones(2), here)
    assert put(x, here) is x
    assert put(x, there).sharding == there
    assert jax.eval_shape(lambda y: put(y, there), x) == jax.ShapeDtypeStruct((2,), jnp.float32)
    uncommitted = jnp.ones(2)  # where it is may change with the next function that uses it
    assert not uncommitted.committed and put(uncommitted, here).committed


def test_batches_are_split_and_weights_copied():
    (sharding,) = fr.placement(1, jax.devices()[:2], data_parallel=2)
    x = put({"x": jnp.arange(8.0).reshape(4, 2)}, sharding)["x"]
    assert [shard.data.shape for shard in x.addressable_shards] == [(2, 2), (2, 2)]
    w = put(jnp.arange(3.0), replicated(sharding))
    assert [shard.data.shape for shard in w.addressable_shards] == [(3,), (3,)]


@pytest.mark.parametrize("sharding", [None, fr.placement(2)[1]])
def test_put_does_not_share_the_memory_of_a_numpy_array(sharding):
    raw = np.zeros(4096 + 16, np.float32)
    start = (-raw.ctypes.data // 4) % 16  # JAX on a CPU takes aligned arrays over without a copy
    x = raw[start : start + 4096]
    y = put(x, sharding)
    jax.block_until_ready(y)
    x[:] = 1
    np.testing.assert_array_equal(y, 0)


def test_place_copies_unless_told_otherwise():
    (sharding,) = fr.placement(1)
    raw = np.zeros(4096 + 16, np.float32)
    start = (-raw.ctypes.data // 4) % 16
    x = raw[start : start + 4096]
    copied, shared = place({"x": x}, sharding)["x"], place(x, sharding, copy=False)
    jax.block_until_ready((copied, shared))
    x[:] = 1
    assert read(copied)[0] == 0 and is_readable(shared)
    assert shared.unsafe_buffer_pointer() == x.ctypes.data  # otherwise a data set would stand in memory twice


def test_windows_keep_the_order_and_the_limit(monkeypatch):
    monkeypatch.setattr(_arrays, "WINDOW_BYTES", 10)
    assert list(windows({"a": 4, "b": 6, "c": 1, "d": 30, "e": 0})) == [["a", "b"], ["c"], ["d"], ["e"]]
