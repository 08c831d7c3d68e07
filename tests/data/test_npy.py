"""Images of the user's own, mapped from NumPy files."""

import jax
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.data import DataError, input_pipeline, load

N, TEST = 22, 7


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for what, count in (("train", N), ("test", TEST)):
        np.save(tmp_path / f"{what}_images.npy", rng.integers(0, 256, (count, 5, 6, 3), np.uint8))
        np.save(tmp_path / f"{what}_labels.npy", rng.integers(0, 4, count))
    return tmp_path


def test_each_epoch_sees_every_image_once(folder):
    dataset = load("npy", folder)
    assert isinstance(dataset.train_images, np.memmap) and dataset.num_classes == 4
    assert dataset.source.endswith(f"22 train and 7 test images from {folder}")
    pipeline = input_pipeline(dataset, 11, seed=3)
    epochs = [[pipeline.train_batch(2 * epoch + i) for i in range(2)] for epoch in range(2)]
    for batches in epochs:
        assert sorted(np.concatenate([batch.index for batch in batches])) == list(range(N))
        for batch in batches:
            images = (dataset.train_images[batch.index] / 255 - dataset.mean) / dataset.std
            np.testing.assert_allclose(batch.inputs, images, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(batch.targets, dataset.train_labels[batch.index])
    assert (epochs[0][0].index != epochs[1][0].index).any()
    again = input_pipeline(dataset, 11, seed=3).train_batch(3)  # a resumed run needs nothing but its step
    jax.tree.map(np.testing.assert_array_equal, again, epochs[1][1])


def test_test_images_in_order_over_two_devices(folder):
    dataset = load("npy", folder)
    (sharding,) = fr.placement(1, data_parallel=2)
    found = list(input_pipeline(dataset, 4, seed=0, sharding=sharding).test_batches())
    assert [valid for _, valid in found] == [4, 3]
    assert np.concatenate([batch.index[:valid] for batch, valid in found]).tolist() == list(range(TEST))
    assert found[0][0].inputs.sharding == sharding and found[0][0].inputs.shape == (4, 5, 6, 3)


def test_mapped_images_are_cropped_and_flipped(folder):
    pipeline = input_pipeline(load("npy", folder)._replace(flip=True), 11, seed=3, augment=True)
    plain = input_pipeline(load("npy", folder), 11, seed=3)
    batch, other = pipeline.train_batch(0), plain.train_batch(0)
    np.testing.assert_array_equal(batch.index, other.index)
    assert (batch.inputs != other.inputs).any()
    jax.tree.map(np.testing.assert_array_equal, batch, pipeline.train_batch(0))


def remove(folder):
    (folder / "test_labels.npy").unlink()


def cut_short(folder):
    path = folder / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(folder):
    path = folder / "test_labels.npy"
    path.write_bytes(path.read_bytes().replace(b"{'descr'", b"{'desc(("))


def code(folder):
    np.save(folder / "train_labels.npy", np.array([print] * N, object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove, "has no test_labels.npy; --dataset npy needs train_images.npy, train_labels.npy"),
        (cut_short, "train_images.npy cannot be read as a NumPy file"),
        (damage_header, "test_labels.npy cannot be read as a NumPy file"),
        (code, "train_labels.npy cannot be read as a NumPy file"),
        (lambda f: np.save(f / "train_images.npy", np.ones((N, 5, 6))), r"is float64\[22, 5, 6\]; images are uint8"),
        (lambda f: np.save(f / "test_labels.npy", np.ones(3, int)), r"is int64\[3\]; labels .* of the 7 images"),
        (lambda f: np.save(f / "test_labels.npy", -np.ones(TEST, int)), "has the label -1; labels count from 0"),
        (lambda f: np.save(f / "test_images.npy", np.ones((TEST, 5, 7, 3), np.uint8)), "must have the same size"),
    ],
)
def test_bad_files_are_named(folder, damage, said):
    damage(folder)
    with pytest.raises(DataError, match=said):
        load("npy", folder)


def test_a_folder_is_needed():
    with pytest.raises(DataError, match="--dataset npy needs --data-dir FOLDER with train"):
        load("npy")
