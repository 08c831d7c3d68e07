import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fr_jax.algorithms import _history as history


def zeros():
    return {"h": jnp.zeros(2)}


@pytest.mark.parametrize("length", [0, 1, 3])
def test_first_in_is_first_out_after_the_zeros(length):
    buffer = history.empty(length, zeros)
    seen = []
    for value in range(6):
        buffer = history.push(buffer, {"h": jnp.full(2, value + 1.0)})
        assert len(buffer.entries) == length + 1
        oldest, buffer = history.pop(buffer)
        seen.append(float(oldest["h"][0]))
        assert len(buffer.entries) == length
    assert seen == [0.0] * length + [value + 1.0 for value in range(6 - length)]


def test_nothing_changes_in_place():
    full = history.push(history.empty(1, zeros), {"h": jnp.ones(2)})
    history.push(full, zeros())
    history.pop(full)
    assert [float(entry["h"][0]) for entry in full.entries] == [0.0, 1.0]


def test_entries_are_separate_buffers_and_leaves_of_a_pytree():
    first, second = jax.tree.leaves(history.empty(2, zeros))
    jax.jit(lambda x: x + 1, donate_argnums=0)(first)
    np.testing.assert_array_equal(second, 0)
    assert first.is_deleted()
