import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.data.image_sets import Dataset
from fr_jax.training.classification import _sums, accuracy, classification, cross_entropy, training_metrics
from fr_jax.training.evaluation import sum_over
from fr_jax.types import Batch


def naive_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]


def test_cross_entropy_and_accuracy_are_numpys():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, 5)).astype(np.float32), rng.integers(0, 5, 7)
    np.testing.assert_allclose(cross_entropy(logits, labels), naive_losses(logits, labels).mean(), rtol=1e-5)
    np.testing.assert_allclose(accuracy(logits, labels), (logits.argmax(-1) == labels).mean(), rtol=1e-6)
    assert set(training_metrics(jnp.asarray(logits), jnp.asarray(labels))) == {"accuracy"}


def small_data(test_size: int) -> Dataset:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (8 + test_size, 4, 4, 3), np.uint8)
    labels = rng.integers(0, 3, 8 + test_size).astype(np.int32)
    mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
    return Dataset("made up", images[:8], labels[:8], images[8:], labels[8:], 3, mean, std, False, "made up")


@pytest.mark.parametrize("data_parallel", [1, 2])
@pytest.mark.parametrize("test_size", [3, 8, 50])  # less than a batch, whole batches, a ragged end
def test_evaluate_counts_every_example_once(test_size, data_parallel):
    data = small_data(test_size)
    (sharding,) = fr.placement(1, data_parallel=data_parallel)
    task = classification(data, 4, seed=0, sharding=sharding)
    weights = np.random.default_rng(2).normal(size=(48, 3)).astype(np.float32)
    predict = jax.jit(lambda state, x: x.reshape(x.shape[0], -1) @ state)
    score = task.evaluate(predict, weights)
    logits = ((data.test_images / 255.0 - 0.5) / 0.25).reshape(test_size, -1) @ weights
    np.testing.assert_allclose(score["loss"], naive_losses(logits, data.test_labels).mean(), rtol=1e-4)
    assert score["accuracy"] == (logits.argmax(-1) == data.test_labels).mean()
    assert (task.unit, task.units_per_step, task.examples, task.num_classes) == ("images", 4, 8, 3)


def test_what_fills_up_the_last_batch_cannot_spoil_the_score():
    logits = jnp.array([[0.0, 5.0], [jnp.nan, jnp.nan]])
    batch = Batch(jnp.zeros((2, 1)), jnp.array([1, 1]))
    totals = sum_over(_sums, lambda state, x: logits, None, [(batch, 1)])
    assert totals["accuracy"] == totals["examples"] == 1 and np.isfinite(totals["loss"])


def test_a_loss_that_is_not_finite_stays_visible():
    batch = Batch(jnp.zeros((2, 1)), jnp.array([1, 1]))
    assert np.isnan(sum_over(_sums, lambda state, x: jnp.full((2, 2), jnp.nan), None, [(batch, 2)])["loss"])


def test_no_examples_are_an_error():
    with pytest.raises(ValueError, match="at least one"):
        sum_over(_sums, lambda state, x: x, None, [])
