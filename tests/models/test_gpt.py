import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.models.gpt import has_fused_kernel, rotated
from fr_jax.partitioning.costs import layer_flops
from fr_jax.types import Batch

KEY = jax.random.key(0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 8)), jnp.int32)
TINY = {"vocab_size": 11, "depth": 2, "width": 8, "heads": 2, "context": 8}


def loss_fn(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def count(layers):
    params, _ = jax.eval_shape(fr.chain(*layers).init, KEY, jnp.zeros((1, 4), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_numbers_of_parameters(positions):
    V, L, W, T = 50_257, 12, 768, 1024
    of_positions = T * W if positions == "learned" else 0
    assert count(fr.models.gpt(V, L, W, 12, T, positions=positions)) == (
        12 * L * W**2 + 13 * L * W + 2 * W + 2 * V * W + of_positions
    )


def test_gpt_2_small_has_the_published_size():
    """124,439,808 in OpenAI's checkpoint, where one matrix is embedding and output matrix."""
    assert count(fr.models.gpt(50_257, 12, 768, 12, 1024, positions="learned")) - 50_257 * 768 == 124_439_808


def test_layers():
    layers = fr.models.gpt(depth=3, width=8, heads=2)
    assert len(layers) == 2 * 3 + 2
    assert layers[1] is layers[3] is layers[5] and layers[2] is layers[4] and len(set(layers)) == 4
    assert layers[1] is fr.models.gpt(depth=3, width=8, heads=2)[1]
    assert layers[1] is not fr.models.gpt(depth=4, width=8, heads=2)[1]  # its weights start smaller


@pytest.fixture(scope="module")
def tiny():
    """Positions -> network, weights."""

    def make(positions):
        net = fr.chain(*fr.models.gpt(**TINY, positions=positions))
        params, state = jax.jit(net.init)(KEY, TOKENS)
        # Larger weights than the first ones, so that attention differs from a mean.
        return net, jax.tree.map(lambda w: 3 * w, params), state

    return functools.cache(make)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_no_output_depends_on_a_later_token(tiny, positions):
    net, params, state = tiny(positions)
    run = jax.jit(lambda tokens: net.apply(params, state, tokens, train=False)[0])
    before = np.asarray(run(TOKENS))
    assert before.shape == (4, 8, 11) and before.dtype == np.float32
    for t in (0, 3, 7):
        after = np.asarray(run(TOKENS.at[:, t].add(1) % 11))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert all(not np.allclose(after[:, s], before[:, s], atol=1e-3) for s in range(t, 8))


def test_it_is_a_transformer(tiny):
    """Against NumPy, one head and one example at a time."""
    net, params, state = tiny("learned")
    embedding, *blocks, head = jax.tree.map(np.asarray, params)

    def norm(h, p):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def dense(h, p):
        return h @ p["kernel"] + p["bias"]

    def attend(h, p):
        qkv = dense(norm(h, p["LayerNorm_0"]), p["Dense_0"])
        out = np.zeros_like(h)
        for head in range(2):
            q, k, v = (qkv[:, part * 8 + head * 4 : part * 8 + head * 4 + 4] for part in range(3))
            for t in range(len(h)):
                scores = q[t] @ k[: t + 1].T / np.sqrt(4)
                weights = np.exp(scores - scores.max())
                out[t, head * 4 : head * 4 + 4] = weights / weights.sum() @ v[: t + 1]
        return h + dense(out, p["Dense_1"])

    def feed(h, p):
        y = dense(norm(h, p["LayerNorm_0"]), p["Dense_0"])
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        return h + dense(y, p["Dense_1"])

    expected = []
    for tokens in np.asarray(TOKENS):
        h = embedding["token_embedding"][tokens] + embedding["position_embedding"]
        for block in (blocks[:2], blocks[2:]):
            h = feed(attend(h, block[0]), block[1])
        expected.append(norm(h, head["LayerNorm_0"]) @ head["kernel"])
    found = net.apply(params, state, TOKENS, train=False)[0]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-3, atol=1e-4)


def test_rotary_scores_depend_on_the_distance():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 2, 6)) for i in (0, 1))
    rows = [rotated(jnp.repeat(x, 5, axis=1))[0] for x in (q, k)]
    scores = np.einsum("thd,shd->hts", *rows)
    np.testing.assert_allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[:, 0, 0], np.einsum("hd,hd->h", q[0, 0], k[0, 0]), rtol=1e-5)
    assert np.ptp(scores[0, 0]) > 0.1


def test_initial_weights():
    """GPT-2's at width 768; larger for narrow layers."""
    layers, h, std = fr.models.gpt(depth=8, width=192), jnp.zeros((1, 4, 192)), 0.04
    embedding, _ = layers[0].init(KEY, TOKENS)
    attention, mlp, head = (layer.init(KEY, h)[0] for layer in (*layers[1:3], layers[-1]))
    plain = (embedding["token_embedding"], attention["Dense_0"]["kernel"], mlp["Dense_0"]["kernel"], head["kernel"])
    for weights in plain:
        assert float(weights.std()) == pytest.approx(std, rel=0.05)
    for layer in (attention, mlp):
        assert float(layer["Dense_1"]["kernel"].std()) == pytest.approx(std / 4, rel=0.05)
        assert not layer["Dense_1"]["bias"].any()


def test_dtypes():
    layers = fr.models.gpt(**TINY, positions="learned", dtype=jnp.bfloat16)
    params, state = jax.eval_shape(fr.chain(*layers).init, KEY, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    h, dtypes = TOKENS, []
    for layer, p, s in zip(layers, params, state, strict=True):
        h, _ = jax.eval_shape(functools.partial(layer.apply, train=False), p, s, h)
        dtypes.append(h.dtype)
    assert dtypes == [jnp.bfloat16] * 5 + [jnp.float32]


def test_dropout_is_random_in_training_only():
    layers = fr.models.gpt(**TINY, dropout_rate=0.5)
    h = TOKENS
    for layer in layers[:3]:
        params, state = jax.jit(layer.init)(KEY, h)
        one, two = (layer.apply(params, state, h, key=jax.random.key(i), train=True)[0] for i in (1, 2))
        assert not np.array_equal(one, two)
        h, again = (layer.apply(params, state, h, train=False)[0] for _ in range(2))
        np.testing.assert_array_equal(h, again)


METHODS = {
    "fr": fr.features_replay,
    "ddg": fr.ddg,
    "bp": fr.backprop,
}


@pytest.mark.parametrize(
    ("method", "K", "dtype"),
    [
        ("fr", 3, "float32"),
        ("ddg", 4, "bfloat16"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("fr", 6, "bfloat16"), ("bp", 1, "bfloat16"))),
    ],
)
def test_it_trains(method, K, dtype):
    """Sequences that count upwards, from any token: the next one is certain."""
    layers = fr.models.gpt(**TINY, dtype=jnp.dtype(dtype))
    tokens = (jnp.arange(11, dtype=jnp.int32)[:, None] + jnp.arange(9, dtype=jnp.int32)[None]) % 11
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    stages = fr.cut(layers, K, batch.inputs, method=method)
    algorithm = METHODS[method](stages, loss_fn, optax.adam(1e-2), placement=fr.placement(K), donate=True)
    state = algorithm.init(KEY, batch)
    losses = []
    for _ in range(60):
        state, info = algorithm.step(state, batch)
        losses.append(info.loss)
    assert float(losses[0]) == pytest.approx(np.log(11), rel=0.15) and float(losses[-1]) < 1.9


def test_gradients_of_late_stages_are_exact():
    """With a step size of zero features replay has the gradient of back-propagation, also behind an embedding."""
    layers, K = fr.models.gpt(**TINY), 3
    batch = Batch(TOKENS, (TOKENS + 1) % 11)
    options = {"placement": fr.placement(K), "return_grads": True}
    stages = fr.partition(layers, (1, 3))
    found = {}
    for name, method in (("fr", fr.features_replay), ("bp", fr.backprop)):
        algorithm = method(stages, loss_fn, optax.sgd(0.0), **options)
        state = algorithm.init(KEY, batch)
        for _ in range(K):
            state, info = algorithm.step(state, batch)
        found[name] = info.grads
    for one, two in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-7)


def test_cuts_are_balanced():
    layers = fr.models.gpt(depth=8, width=32)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    costs = [cost.both_gradients for cost in layer_flops(layers, tokens)]
    assert costs[1] > 10 * costs[0] and costs[1] == costs[3] and costs[2] == costs[4]
    assert [len(stage.layers) for stage in fr.cut(layers, 4, tokens, method="bp")] in ([5, 4, 4, 5], [5, 4, 5, 4])


def test_the_fused_kernel_is_for_half_precision_on_a_recent_gpu(monkeypatch):
    class Device:
        platform, compute_capability = "gpu", "9.0"

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert has_fused_kernel(jnp.dtype(jnp.bfloat16), 64)
    assert not has_fused_kernel(jnp.dtype(jnp.float32), 64)
    assert not any(has_fused_kernel(jnp.dtype(jnp.bfloat16), width) for width in (4, 20, 136))  # cuDNN refuses them
    with jax.default_device(jax.local_devices()[0]):
        assert not has_fused_kernel(jnp.dtype(jnp.bfloat16), 64)
    for other in ("7.5", "gfx90a", ""):
        monkeypatch.setattr(Device, "compute_capability", other)
        assert not has_fused_kernel(jnp.dtype(jnp.bfloat16), 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth = 0; it must be at least 1"),
        ({"width": 10, "heads": 4}, "width = 10, which cannot be split into 4 heads, each of even width"),
        ({"width": 12, "heads": 4}, "multiple of 8, such as 8"),
        ({"positions": "sinus"}, "positions = 'sinus'; it must be one of rotary, learned"),
        ({"attention": "flash"}, "attention = 'flash'; it must be one of auto, xla, cudnn"),
        ({"dropout_rate": 1.0}, "dropout_rate = 1.0; it must be at least 0 and below 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fr.models.gpt(**options)


def test_bad_inputs():
    embedding = fr.models.gpt(**TINY, positions="learned")[0]
    with pytest.raises(ValueError, match="dtype float32; they must be integers"):
        jax.eval_shape(embedding.init, KEY, jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="sequences of 9 tokens; it has learned positions for context = 8"):
        jax.eval_shape(embedding.init, KEY, jnp.zeros((1, 9), jnp.int32))
