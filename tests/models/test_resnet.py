import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.models import resnet

KEY = jax.random.key(0)
IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def test_relu_is_that_of_jax(x64):
    x = jnp.array([-2.0, -0.0, 0.0, 3.0, -jnp.inf, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(resnet.relu(x), jax.nn.relu(x))
    assert resnet.relu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    x = jax.random.normal(KEY, (2, 4, 4, 3)).at[0, 0].set(0.0)
    for derivative in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x + 1,))[1]):
        got, expected = (derivative(lambda x, f=f: (f(x) ** 2 + f(x)).sum())(x) for f in (resnet.relu, jax.nn.relu))
        np.testing.assert_array_equal(got, expected)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def layer_shapes(layer, shape, dtype):
    """Parameters, state and output of a layer; of equal blocks only the first is traced."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    params, state = jax.eval_shape(layer.init, KEY, x)
    return params, state, jax.eval_shape(lambda p, s, x: layer.apply(p, s, x, train=False)[0], params, state, x)


def shapes(layers, x=IMAGES):
    """Parameters, state and the output of every layer, without computing anything."""
    found = []
    for layer in layers:
        found.append(layer_shapes(layer, x.shape, x.dtype))
        x = found[-1][-1]
    return zip(*found, strict=True)


def conv(k, n_in, n_out):
    """A k x k convolution without bias and its batch norm."""
    return k * k * n_in * n_out + 2 * n_out


def basic(blocks, widths, project):
    total, n_in = conv(3, 3, widths[0]), widths[0]
    for n, width in zip(blocks, widths, strict=True):
        for _ in range(n):
            total += conv(3, n_in, width) + conv(3, width, width)
            total += conv(1, n_in, width) if project and n_in != width else 0
            n_in = width
    return total + n_in * 10 + 10


def bottleneck(blocks, widths):
    total, n_in = conv(3, 3, widths[0]), widths[0]
    for n, width in zip(blocks, widths, strict=True):
        for _ in range(n):
            total += conv(1, n_in, width) + conv(3, width, width) + conv(1, width, 4 * width)
            total += conv(1, n_in, 4 * width) if n_in != 4 * width else 0
            n_in = 4 * width
    return total + n_in * 10 + 10


def wide(blocks, widths):
    total, n_in = 27 * 16, 16
    for n, width in zip(blocks, widths, strict=True):
        for _ in range(n):
            total += 2 * n_in + 9 * n_in * width + 2 * width + 9 * width * width
            total += n_in * width if n_in != width else 0
            n_in = width
    return total + 2 * n_in + n_in * 10 + 10


CIFAR, IMAGENET = (16, 32, 64), (64, 128, 256, 512)
# name, blocks, parameters by formula, parameters in millions as published (issue 2, He et al. 2016, Zagoruyko 2016)
PUBLISHED = [
    ("resnet8", 3, basic((1, 1, 1), CIFAR, False), 0.075),
    ("resnet20", 9, basic((3, 3, 3), CIFAR, False), 0.27),
    ("resnet32", 15, basic((5, 5, 5), CIFAR, False), 0.46),
    ("resnet56", 27, basic((9, 9, 9), CIFAR, False), 0.85),
    ("resnet110", 54, basic((18, 18, 18), CIFAR, False), 1.7),
    ("resnet164", 81, basic((27, 27, 27), CIFAR, False), 2.6),
    ("resnet18", 8, basic((2, 2, 2, 2), IMAGENET, True), 11.2),
    ("resnet50", 16, bottleneck((3, 4, 6, 3), IMAGENET), 23.5),
    ("resnet101", 33, bottleneck((3, 4, 23, 3), IMAGENET), 42.5),
    ("resnet152", 50, bottleneck((3, 8, 36, 3), IMAGENET), 58.2),
    ("wrn28_10", 12, wide((4, 4, 4), (160, 320, 640)), 36.5),
]


@pytest.mark.parametrize(("name", "blocks", "parameters", "millions"), PUBLISHED)
def test_layers_parameters_and_shapes(name, blocks, parameters, millions):
    layers = fr.models.MODELS[name]()
    params, _, outputs = shapes(layers)
    assert len(layers) == blocks + 2
    assert count(params) == parameters
    assert parameters == pytest.approx(millions * 1e6, rel=0.02)
    sides = [output.shape[1] for output in outputs[:-1]]
    assert sides[0] == 32 and sides[-1] == (4 if "resnet" in name and millions > 11 else 8)
    assert all(b in (a, a // 2) for a, b in itertools.pairwise(sides))
    assert outputs[-1].shape == (2, 10)


def test_every_network_is_named():
    assert set(fr.models.MODELS) == {"mlp", "gpt", *(name for name, *_ in PUBLISHED)}
    assert all(getattr(fr.models, name) is factory for name, factory in fr.models.MODELS.items())


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "wrn28_10"])
def test_classes_width_and_dtype(name):
    layers = fr.models.MODELS[name](num_classes=7, dtype=jnp.bfloat16, width=2)
    params, state, outputs = shapes(layers)
    assert outputs[-1].shape == (2, 7)
    assert count(params) < 0.05 * {n: p for n, _, p, _ in PUBLISHED}[name]
    assert {leaf.dtype for leaf in jax.tree.leaves((params, state))} == {jnp.dtype(jnp.float32)}
    assert {output.dtype for output in outputs[:-1]} == {jnp.dtype(jnp.bfloat16)}
    assert outputs[-1].dtype == jnp.float32


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="depth"):
        fr.models.resnet20(depth=3)


def zeroed_block(block, x):
    """The block's output where its residual branch gives nothing."""
    stage = fr.from_linen(block)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(stage.init, KEY, x))
    return stage.apply(*zeros, x, train=False)[0]


@pytest.mark.parametrize(("n_in", "n_out", "strides"), [(2, 4, 2), (3, 6, 2), (2, 5, 1), (4, 4, 1)])
def test_option_a_subsamples_and_pads_with_zeros(n_in, n_out, strides):
    x = np.random.default_rng(0).uniform(0.1, 1, (2, 6, 6, n_in)).astype(np.float32)
    y = zeroed_block(resnet.BasicBlock(n_out, strides=strides), jnp.asarray(x))
    before = (n_out - n_in) // 2
    expected = np.zeros((2, 6 // strides, 6 // strides, n_out), np.float32)
    expected[..., before : before + n_in] = x[:, ::strides, ::strides]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("block", "channels"), [(resnet.BasicBlock(4), 4), (resnet.BottleneckBlock(1), 4), (resnet.WideBlock(4), 4)]
)
def test_an_unchanged_shape_has_the_identity_for_a_shortcut(block, channels):
    x = jnp.linspace(0.1, 1.0, 2 * 4 * 4 * channels).reshape(2, 4, 4, channels)
    np.testing.assert_array_equal(zeroed_block(block, x), x)


def test_blocks_begin_with_the_papers_initialisation():
    stem = fr.from_linen(resnet.Stem(64))
    block = fr.from_linen(resnet.BasicBlock(64))
    head = fr.from_linen(resnet.Head(50))
    inputs = [(stem, 3), (block, 32), (head, 400)]
    params = jax.jit(lambda key: [stage.init(key, jnp.zeros((1, 4, 4, n_in)))[0] for stage, n_in in inputs])(KEY)
    for kernel in (params[0]["Conv_0"]["kernel"], params[1]["Conv_0"]["kernel"], params[1]["Conv_1"]["kernel"]):
        k, _, _, n_out = kernel.shape
        assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (k * k * n_out)), rel=0.06)
        assert abs(float(kernel.mean())) < 0.1 * float(kernel.std())
    norm = params[1]["BatchNorm_0"]
    assert (set(norm["scale"].tolist()), set(norm["bias"].tolist())) == ({1.0}, {0.0})
    dense = params[2]["Dense_0"]
    assert float(dense["kernel"].std()) == pytest.approx(np.sqrt(2 / 400), rel=0.03)  # Kaiming normal, fan in
    assert not dense["bias"].any()
    # Normal, not truncated: 4.6 % beyond two standard deviations.
    assert float((jnp.abs(dense["kernel"]) > 2 * dense["kernel"].std()).mean()) == pytest.approx(0.0455, abs=0.01)


def test_running_statistics_move_in_training_and_are_used_in_inference():
    stage = fr.from_linen(resnet.Stem(2))
    x = jnp.asarray(np.random.default_rng(1).normal(2, 3, (4, 4, 4, 3)), jnp.float32)
    params, state = jax.jit(stage.init)(KEY, x)
    convolved = jax.lax.conv_general_dilated(
        x, params["Conv_0"]["kernel"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    convolved = np.asarray(convolved)
    mean, var = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
    y, new = stage.apply(params, state, x, key=KEY, train=True)
    np.testing.assert_allclose(y, np.maximum((convolved - mean) / np.sqrt(var + 1e-5), 0), rtol=1e-3, atol=1e-4)
    moved = jax.tree.map(np.asarray, new["batch_stats"]["BatchNorm_0"])
    np.testing.assert_allclose(moved["mean"], 0.1 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved["var"], 0.9 + 0.1 * var, rtol=1e-4)
    y, same = stage.apply(params, new, x, train=False)
    expected = np.maximum((convolved - moved["mean"]) / np.sqrt(moved["var"] + 1e-5), 0)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
    assert same is new


def test_wide_blocks_drop_between_their_convolutions():
    block = fr.from_linen(resnet.WideBlock(3, dropout_rate=0.5))
    x = jnp.linspace(-1.0, 1.0, 96).reshape(2, 4, 4, 3)
    params, state = jax.jit(block.init)(KEY, x)
    one, again, other = (block.apply(params, state, x, key=jax.random.key(i), train=True)[0] for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", ["resnet20", "wrn28_10"])
def test_equal_blocks_are_one_stage(name):
    assert len(set(fr.models.MODELS[name](width=2))) < len(fr.models.MODELS[name](width=2))
