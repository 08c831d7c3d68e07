import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.data import text
from fr_jax.training.language import Sampling, language_modelling, next_byte_loss, sample, training_metrics

CONTEXT = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """ASCII, again and again: what follows each byte is certain."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(bytes(range(128)) * 20)
    return text.load(files=[path])


def successor(state, tokens):
    """Logits of a network that is sure of the next byte, by ``state``."""
    return state * jax.nn.one_hot((jnp.asarray(tokens) + 1) % 128, 256)


def test_loss_and_metrics_are_numpys():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 256)).astype(np.float32), rng.integers(0, 256, (2, 3))
    wide = logits.astype(np.float64)
    nats = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(next_byte_loss(logits, targets), nats.mean(), rtol=1e-5)
    found = training_metrics(jnp.asarray(logits), jnp.asarray(targets))
    assert set(found) == {"bits_per_byte"}
    np.testing.assert_allclose(found["bits_per_byte"], nats.mean() / np.log(2), rtol=1e-5)


@pytest.mark.parametrize("data_parallel", [1, 2])
def test_evaluation(corpus, data_parallel):
    (sharding,) = fr.placement(1, data_parallel=data_parallel)
    task = language_modelling(corpus, 4, CONTEXT, seed=0, sharding=sharding, test_windows=10)
    score = task.evaluate(successor, 3.0)
    nats = math.log(math.exp(3) + 255) - 3
    assert score["loss"] == pytest.approx(nats, rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert (task.unit, task.units_per_step, task.num_classes) == ("tokens", 4 * CONTEXT, None)
    assert task.examples is None and task.checksum == corpus.checksum
    assert task.source.endswith("windows of 6 bytes") and not task.headline.fraction


@pytest.mark.parametrize("data_parallel", [1, 2])
def test_a_sample_goes_on_from_the_prompt(corpus, data_parallel):
    """Also beyond the context; the input always has one shape."""
    shapes = set()

    def predict(state, tokens):
        shapes.add(tokens.shape)
        return successor(state, tokens)

    (sharding,) = fr.placement(1, data_parallel=data_parallel)
    options = {"context": CONTEXT, "sharding": sharding}
    assert sample(predict, 100.0, b"a", 10, **options) == b"abcdefghijk"
    assert sample(predict, 100.0, b"0123ABCDEFGH", 4, **options) == b"0123ABCDEFGHIJKL"
    assert shapes == {(data_parallel, CONTEXT)}


def test_temperature_and_seed():
    predict = lambda state, tokens: jnp.zeros((*tokens.shape, 256)).at[..., :2].set(jnp.asarray([10.0, 9.0]))
    share = {}
    for temperature in (0, 0.5, 1):
        one, again, other = (
            sample(predict, None, b"x", 150, context=2, temperature=temperature, seed=seed)[1:] for seed in (1, 1, 2)
        )
        assert one == again and (temperature == 0 or one != other)
        share[temperature] = (one + other).count(b"\0") / 300
    assert share[0] == 1
    for temperature in (0.5, 1):
        assert share[temperature] == pytest.approx(1 / (1 + math.exp(-1 / temperature)), abs=0.08)


def test_a_sample_as_text(corpus):
    """Bytes that are not UTF-8, and control characters, are replaced."""
    task = language_modelling(corpus, 4, CONTEXT, seed=0, sampling=Sampling("ü\x7e", 4, 0))
    assert task.sample(successor, 9.0) == "ü~" + "\N{REPLACEMENT CHARACTER}" * 4  # DEL, NUL and so on
    high = lambda state, tokens: jax.nn.one_hot(jnp.full(tokens.shape, 0xC3), 256)
    assert task.sample(high, None) == "ü~" + "\N{REPLACEMENT CHARACTER}" * 4
    newlines = language_modelling(corpus, 4, CONTEXT, seed=0, sampling=Sampling(None, 4, 0))
    assert newlines.sample(successor, 9.0).startswith("\n\N{REPLACEMENT CHARACTER}")
    assert language_modelling(corpus, 4, CONTEXT, seed=0, sampling=Sampling(length=0)).sample is None


def test_an_empty_prompt():
    with pytest.raises(ValueError, match="prompt is empty"):
        sample(successor, 1.0, b"", 1, context=CONTEXT)
