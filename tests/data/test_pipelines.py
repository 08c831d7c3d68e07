import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fr_jax.data.image_sets import Dataset
from fr_jax.data.pipelines import PADDING, input_pipeline

MEAN = np.array([0.4, 0.5, 0.6], np.float32)
STD = np.array([0.2, 0.25, 0.3], np.float32)


def make_dataset(train=50, test=23, shape=(12, 10, 3), crop=True, flip=True, seed=0):
    rng = np.random.default_rng(seed)

    def split(count):
        images = rng.integers(1, 256, (count, *shape), np.uint8)  # no 0, so that padding can be told from pixels
        return images, rng.integers(0, 10, count, dtype=np.int32)

    channels = shape[-1]
    mean, std = MEAN[:channels], STD[:channels]
    return Dataset("random", *split(train), *split(test), 10, mean, std, flip, "random numbers", crop)


@functools.cache
def default_pipeline():
    return input_pipeline(make_dataset(), 8, seed=3)


def pixels(dataset, inputs):
    """The normalisation undone, in NumPy."""
    values = (np.asarray(inputs, np.float64) * dataset.std + dataset.mean) * 255
    np.testing.assert_allclose(values, values.round(), atol=1e-3)
    return values.round().astype(np.uint8)


def windows(image):
    """Every window of the padded image, mirrored or not, by explicit padding."""
    height, width, _ = image.shape
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    for row in range(2 * PADDING + 1):
        for column in range(2 * PADDING + 1):
            window = padded[row : row + height, column : column + width]
            yield (row, column, False), window
            yield (row, column, True), window[:, ::-1]


def find_window(image, crop):
    return [name for name, window in windows(image) if np.array_equal(window, crop)]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def data_mesh(devices=2):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def count_compilations(work):
    """How many programs XLA compiled (or took from a cache) while ``work`` ran."""
    count = 0

    def listen(event, duration, **_):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        work()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


def test_a_batch_is_a_function_of_seed_and_step():
    forward = [default_pipeline().train_batch(step) for step in range(14)]
    fresh = input_pipeline(make_dataset(), 8, seed=3)
    for step in reversed(range(14)):
        assert_same(fresh.train_batch(step), forward[step])


def test_seeds_epochs_and_batches_differ():
    pipeline = default_pipeline()
    one, two = pipeline.train_batch(0), input_pipeline(make_dataset(), 8, seed=4).train_batch(0)
    later, next_epoch = pipeline.train_batch(1), pipeline.train_batch(pipeline.steps_per_epoch)
    for other in (two, later, next_epoch):
        assert not np.array_equal(one.index, other.index)


def test_an_epoch_visits_every_example_at_most_once():
    pipeline = default_pipeline()
    assert pipeline.steps_per_epoch == 6
    for epoch in range(3):
        steps = range(epoch * 6, (epoch + 1) * 6)
        index = np.concatenate([pipeline.train_batch(step).index for step in steps])
        assert len(np.unique(index)) == len(index) == 48
        assert index.min() >= 0 and index.max() < 50


def test_index_and_targets_belong_to_the_images():
    dataset = make_dataset()
    batch = input_pipeline(dataset, 16, seed=0, augment=False).train_batch(0)
    index = np.asarray(batch.index)
    np.testing.assert_array_equal(batch.targets, dataset.train_labels[index])
    np.testing.assert_array_equal(pixels(dataset, batch.inputs), dataset.train_images[index])
    assert batch.targets.dtype == batch.index.dtype == jnp.int32


def test_normalisation():
    dataset = make_dataset()
    batch = input_pipeline(dataset, 16, seed=0, augment=False).train_batch(0)
    expected = (dataset.train_images[np.asarray(batch.index)].astype(np.float32) / 255 - dataset.mean) / dataset.std
    np.testing.assert_allclose(batch.inputs, expected, rtol=1e-6, atol=1e-6)


def test_every_crop_is_one_window_of_the_padded_image():
    dataset = make_dataset(train=200)
    batch = input_pipeline(dataset, 200, seed=0).train_batch(0)
    found = [
        find_window(dataset.train_images[i], crop)
        for i, crop in zip(np.asarray(batch.index), pixels(dataset, batch.inputs), strict=True)
    ]
    assert all(len(names) == 1 for names in found)
    rows, columns, mirrored = (np.array(values) for values in zip(*(names[0] for names in found), strict=True))
    # 200 draws: each of the nine places of an axis is missed with probability 6e-11; mirrored is 100 ± 7.
    assert set(rows) == set(columns) == set(range(2 * PADDING + 1))
    assert 60 < mirrored.sum() < 140


def test_without_flip_nothing_is_mirrored():
    dataset = make_dataset(train=100, flip=False)
    batch = input_pipeline(dataset, 100, seed=0).train_batch(0)
    for i, crop in zip(np.asarray(batch.index), pixels(dataset, batch.inputs), strict=True):
        ((_, _, mirrored),) = find_window(dataset.train_images[i], crop)
        assert not mirrored


def windows_used(dataset, augment):
    """Each example's window of its padded image, ``(row, column, mirrored)``, in a batch of the whole training set."""
    batch = input_pipeline(dataset, len(dataset.train_labels), seed=0, augment=augment).train_batch(0)
    used = []
    for i, crop in zip(np.asarray(batch.index), pixels(dataset, batch.inputs), strict=True):
        used += find_window(dataset.train_images[i], crop)
    assert len(used) == len(dataset.train_labels)
    return used


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("augment", [None, False, True])
def test_what_augment_means(augment, crop, flip):
    used = windows_used(make_dataset(train=40, crop=crop, flip=flip), augment)
    cropped = {window[:2] for window in used} != {(PADDING, PADDING)}
    mirrored = any(window[2] for window in used)
    assert (cropped, mirrored) == {None: (crop, flip), False: (False, False), True: (True, flip)}[augment]


def test_mirrored_alike_with_and_without_crops():
    cropped, whole = (windows_used(make_dataset(train=40, crop=crop), None) for crop in (True, False))
    assert [window[2] for window in cropped] == [window[2] for window in whole]


def test_augmentation_changes_from_epoch_to_epoch():
    dataset = make_dataset(train=16)
    pipeline = input_pipeline(dataset, 16, seed=0)
    crops = []
    for epoch in range(2):
        batch = pipeline.train_batch(epoch)
        crops.append(np.asarray(batch.inputs)[np.argsort(batch.index)])
    same = [np.array_equal(a, b) for a, b in zip(*crops, strict=True)]
    assert sum(same) <= 2


def test_grey_images_of_another_size():
    dataset = make_dataset(shape=(28, 28, 1), crop=False, flip=False)
    pipeline = input_pipeline(dataset, 4, seed=0)
    batch = pipeline.train_batch(0)
    assert batch.inputs.shape == (4, 28, 28, 1)
    np.testing.assert_array_equal(pixels(dataset, batch.inputs), dataset.train_images[np.asarray(batch.index)])
    images = np.concatenate([pixels(dataset, batch.inputs)[:valid] for batch, valid in pipeline.test_batches()])
    np.testing.assert_array_equal(images, dataset.test_images)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype(dtype):
    pipeline = input_pipeline(make_dataset(), 4, seed=0, dtype=dtype)
    assert pipeline.train_batch(0).inputs.dtype == dtype
    assert next(pipeline.test_batches())[0].inputs.dtype == dtype


@pytest.mark.parametrize("test_batch_size", [None, 23, 5, 40])
def test_test_batches_count_each_example_once(test_batch_size):
    dataset = make_dataset(test=23)
    pipeline = input_pipeline(dataset, 8, seed=0, test_batch_size=test_batch_size)
    for _ in range(2):
        batches = list(pipeline.test_batches())
        assert {batch.inputs.shape[0] for batch, _ in batches} == {test_batch_size or 8}
        images = np.concatenate([pixels(dataset, batch.inputs)[:valid] for batch, valid in batches])
        targets = np.concatenate([batch.targets[:valid] for batch, valid in batches])
        index = np.concatenate([batch.index[:valid] for batch, valid in batches])
        np.testing.assert_array_equal(images, dataset.test_images)
        np.testing.assert_array_equal(targets, dataset.test_labels)
        np.testing.assert_array_equal(index, np.arange(23))


def test_the_last_test_batch_is_filled_with_zeros():
    dataset = make_dataset(test=10)
    *_, (batch, valid) = input_pipeline(dataset, 8, seed=0).test_batches()
    assert valid == 2
    assert not pixels(dataset, batch.inputs)[2:].any()
    assert not batch.targets[2:].any() and not batch.index[2:].any()


def test_one_compilation_serves_all_steps():
    pipeline = default_pipeline()
    pipeline.train_batch(0)
    list(pipeline.test_batches())
    assert count_compilations(lambda: input_pipeline(make_dataset(), 8, seed=1).train_batch(0)) > 0
    work = lambda: ([pipeline.train_batch(step) for step in range(20)], list(pipeline.test_batches()))
    assert count_compilations(work) == 0


def test_train_batch_never_moves_data_implicitly():
    pipeline = default_pipeline()
    with jax.transfer_guard("disallow"):
        for step in range(14):
            pipeline.train_batch(step)
        list(pipeline.test_batches())


def test_one_device():
    sharding = SingleDeviceSharding(jax.devices()[3])
    pipeline = input_pipeline(make_dataset(), 8, seed=3, sharding=sharding)
    batches = [pipeline.train_batch(0), next(pipeline.test_batches())[0]]
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(batches))
    default = default_pipeline()
    assert_same(default.train_batch(0), batches[0])


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec("data", None, None, None)])
def test_a_mesh_of_two_devices_splits_the_same_batch(spec):
    sharding = NamedSharding(data_mesh(), spec)
    pipeline = input_pipeline(make_dataset(), 8, seed=3, sharding=sharding)
    default = default_pipeline()
    for step in (0, 9):
        batch = pipeline.train_batch(step)
        for leaf in jax.tree.leaves(batch):
            assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [4, 4]
        assert_same(default.train_batch(step), batch)
    for (batch, valid), (expected, expected_valid) in zip(pipeline.test_batches(), default.test_batches(), strict=True):
        assert valid == expected_valid
        assert_same(batch, expected)


@pytest.mark.parametrize(("size", "words"), [(0, "is 0"), (51, "at most the 50"), (7, "multiple of 2")])
def test_impossible_batch_sizes(size, words):
    with pytest.raises(ValueError, match=words):
        input_pipeline(make_dataset(), size, seed=0, sharding=NamedSharding(data_mesh(), PartitionSpec("data")))


def test_impossible_test_batch_size():
    with pytest.raises(ValueError, match="test_batch_size is -1"):
        input_pipeline(make_dataset(), 8, seed=0, test_batch_size=-1)


def test_unknown_sharding():
    with pytest.raises(ValueError, match="is a str; it must be a SingleDeviceSharding"):
        input_pipeline(make_dataset(), 8, seed=0, sharding="cpu:3")
