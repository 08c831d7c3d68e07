"""The parts of a step of data parallelism: a device's share of the work, and the all-reduces of the compiled step."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.diagnostics.profiling import data_parallel_times
from fr_jax.diagnostics.profiling.data_parallel_times import all_reduces, data_parallel_timer
from fr_jax.diagnostics.profiling.watched_steps import Call
from fr_jax.training.classification import cross_entropy


class Normalised(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width, use_bias=False)(x)))


def timer(layers, inputs, **options):
    batch = fr.Batch(inputs, np.zeros(len(inputs), np.int32))
    options = {"placement": fr.placement(1, data_parallel=2)[0], "repeats": 1} | options
    return data_parallel_timer(fr.chain(*layers), cross_entropy, optax.sgd(0.1, momentum=0.9), batch, **options)


def sizes(found):
    return [sorted(math.prod(one.shape) for one in summed) for summed in found]


def test_all_reduces_are_those_of_the_gradients_and_of_batch_norm(monkeypatch):
    """And what is timed has just these, as long as there are several devices."""
    seen, original = [], data_parallel_times._reducer

    def keep(found, placement, *, sums):
        run, arrays = original(found, placement, sums=sums)
        seen.append((found, all_reduces(run.lower(1, *arrays).compile())))
        return run, arrays

    monkeypatch.setattr(data_parallel_times, "_reducer", keep)
    timer([fr.from_linen(Normalised(5)), fr.from_linen(Normalised(3))], np.ones((4, 20), np.float32))
    (_, without), (found, timed) = seen
    assert without == []
    assert sizes(found)[:2] == [[5, 5], [3, 3]]  # forward: means and variances, layer after layer
    backward = [size for summed in sizes(found)[2:] for size in summed]
    # Gradients of the kernels, and the loss; of both layers' scales and biases, which are also those of the statistics.
    assert {20 * 5, 5 * 3, 1} <= set(backward) and min(backward.count(5), backward.count(3)) >= 2
    assert sizes(timed) == sizes(found)


def test_measures_each_devices_part(monkeypatch):
    shapes = []

    def record(call):
        shapes.append(jax.tree.leaves(call.arguments)[-1].shape)
        return 0.05

    monkeypatch.setattr(Call, "seconds", record)
    measured = timer(fr.models.mlp(depth=2, width=8), np.ones((6, 20), np.float32))()
    assert set(shapes) == {(3,)} and measured.times.stages[0].last == 0.05
    assert 0 < measured.times.all_reduce < 10 and measured.times.features == ()


def test_all_reduces_of_what_has_none():
    assert all_reduces(jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()) == []


class Compiled:
    def __init__(self, text):
        self.text = text

    def as_text(self):
        return self.text


def test_reads_what_an_accelerator_compiles():
    """A GPU starts all-reduces and waits for them; layouts may have tiles."""
    text = """
  %all-reduce-start.1 = (bf16[128,64]{1,0:T(8,128)}, f32[]) all-reduce-start(%a, %b), channel_id=1
  %all-reduce-done.1 = (bf16[128,64]{1,0}, f32[]) all-reduce-done(%all-reduce-start.1)
  ROOT %all-reduce.7 = f32[10]{0} all-reduce(%c), channel_id=2
"""
    found = all_reduces(Compiled(text))
    assert [[(one.shape, str(one.dtype)) for one in summed] for summed in found] == [
        [((128, 64), "bfloat16"), ((), "float32")],
        [((10,), "float32")],
    ]
    with pytest.raises(ValueError, match="an all-reduce of f8e4m3; known are bf16, f16"):
        all_reduces(Compiled("  %x = f8e4m3[2]{0} all-reduce(%y)"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats = 0"),
        ({"placement": fr.placement(1)[0]}, "is not over several devices; give fr_jax.placement"),
    ],
)
def test_errors_say_what_was_given(options, message):
    with pytest.raises(ValueError, match=message):
        timer(fr.models.mlp(depth=2, width=8), np.ones((6, 20), np.float32), **options)
