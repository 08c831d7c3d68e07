import gzip
import hashlib
import struct

import numpy as np
import pytest

from fr_jax.data import _mnist, _tfds_copies, download
from fr_jax.data.image_sets import DataError, load
from fr_jax.data.pipelines import input_pipeline

CLOSED = "http://127.0.0.1:1/"  # refused at once
TRAIN, TEST = 30, 20
NAMES = list(_mnist.FILES)
FOLDERS = [".", "mnist", "MNIST", "MNIST/raw"]
SPELLINGS = {
    "gzipped": lambda name: name + ".gz",
    "plain": lambda name: name,
    "dotted and gzipped": lambda name: name.replace("-idx", ".idx") + ".gz",
    "dotted": lambda name: name.replace("-idx", ".idx"),
}
quiet = {"log": lambda _: None}


@pytest.fixture(autouse=True)
def few_records(bare_machine, monkeypatch):
    for name, file in list(_mnist.FILES.items()):
        shape = (TRAIN if name.startswith("train") else TEST, *file.shape[1:])
        monkeypatch.setitem(_mnist.FILES, name, file._replace(shape=shape))


def make_arrays():
    rng = np.random.default_rng(5)
    return {
        name: rng.integers(0, 256 if "images" in name else 10, file.shape, np.uint8)
        for name, file in _mnist.FILES.items()
    }


def idx(array, kind=8):
    """The format's own description, in NumPy: http://yann.lecun.com/exdb/mnist (section FILE FORMATS)."""
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def make_contents():
    return {name: idx(array) for name, array in make_arrays().items()}


def write(folder, contents, spelled=SPELLINGS["gzipped"]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        file = folder / spelled(name)
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return folder


def fail(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load(*args, **quiet, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_is_ours(dataset):
    arrays = make_arrays()
    train_images, train_labels, test_images, test_labels = (arrays[name] for name in NAMES)
    np.testing.assert_array_equal(dataset.train_images, train_images[..., None])
    np.testing.assert_array_equal(dataset.train_labels, train_labels)
    np.testing.assert_array_equal(dataset.test_images, test_images[..., None])
    np.testing.assert_array_equal(dataset.test_labels, test_labels)


def test_official_headers_and_sizes(monkeypatch):
    monkeypatch.undo()
    images, labels, test_images, test_labels = _mnist.FILES.values()
    # What `gzip -dc | xxd` and `wc -c` say of the published files.
    assert images.header.hex() == "000008030000ea600000001c0000001c" and images.size == 47_040_016
    assert labels.header.hex() == "000008010000ea60" and labels.size == 60_008
    assert test_images.header.hex() == "00000803000027100000001c0000001c" and test_images.size == 7_840_016
    assert test_labels.header.hex() == "0000080100002710" and test_labels.size == 10_008
    for name, file in _mnist.FILES.items():
        urls = [file.archive.url, *file.archive.mirrors]
        assert len(urls) >= 2 and all(url.startswith("https://") and url.endswith(f"/{name}.gz") for url in urls)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_official_files(folder, spelling, tmp_path):
    write(tmp_path / "data" / folder, make_contents(), SPELLINGS[spelling])
    dataset = load("mnist", tmp_path / "data")
    assert_is_ours(dataset)
    assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int32
    assert (dataset.name, dataset.num_classes, dataset.crop, dataset.flip) == ("mnist", 10, False, False)
    assert dataset.source.startswith("MNIST: 30 train and 20 test images from the official idx files in ")
    assert dataset.source.endswith(str(tmp_path / "data" / folder))


def test_only_what_was_published_is_official(tmp_path, monkeypatch):
    contents, lines = make_contents(), []
    for name, content in contents.items():
        monkeypatch.setitem(_mnist.FILES, name, _mnist.FILES[name]._replace(md5=hashlib.md5(content).hexdigest()))
    folder = write(tmp_path, contents)
    assert "the official idx files" in load("mnist", folder, log=lines.append).source and lines == []
    other = contents[NAMES[0]][:-1] + bytes([contents[NAMES[0]][-1] ^ 1])
    write(tmp_path, {NAMES[0]: other})
    assert (
        f"from idx files in {folder} that are not the official ones" in load("mnist", folder, log=lines.append).source
    )
    assert len(lines) == 1 and f"NOT THE PUBLISHED MNIST: {NAMES[0]} in" in lines[0]


def test_one_of_the_files_stands_for_its_folder(tmp_path):
    assert_is_ours(load("mnist", write(tmp_path / "data", make_contents()) / "train-labels-idx1-ubyte.gz"))


def test_auto_takes_mnist_from_the_data_folder(tmp_path):
    assert_is_ours(load("auto", str(write(tmp_path, make_contents())), preferred="mnist"))


def test_the_fuller_folder_wins(tmp_path):
    contents = make_contents()
    write(tmp_path, {NAMES[0]: b"a stray file"})
    write(tmp_path / "MNIST" / "raw", contents)
    assert_is_ours(load("mnist", tmp_path))


def test_gzipped_or_not_is_told_by_the_content(tmp_path):
    folder = write(tmp_path, make_contents())
    for name in NAMES[:2]:
        path = folder / (name + ".gz")
        path.write_bytes(gzip.decompress(path.read_bytes()))
    assert_is_ours(load("mnist", folder))


def test_mean_and_std_are_those_of_one_channel(tmp_path):
    dataset = load("mnist", write(tmp_path, make_contents()))
    scaled = dataset.train_images.astype(np.float64) / 255
    assert dataset.mean.shape == dataset.std.shape == (1,)
    np.testing.assert_allclose(dataset.mean, scaled.mean(), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, scaled.std(), rtol=1e-6)


def test_batches_are_not_cropped(tmp_path):
    dataset = load("mnist", write(tmp_path, make_contents()))
    pipeline = input_pipeline(dataset, 8, seed=0)
    batch = pipeline.train_batch(0)
    images = dataset.train_images[np.asarray(batch.index)]
    np.testing.assert_allclose(batch.inputs, (images / 255.0 - dataset.mean) / dataset.std, atol=1e-5)
    counts = [(batch.inputs.shape, valid) for batch, valid in pipeline.test_batches()]
    assert counts == [((8, 28, 28, 1), 8), ((8, 28, 28, 1), 8), ((8, 28, 28, 1), 4)]


@pytest.mark.parametrize("name", NAMES)
def test_missing_file(name, tmp_path):
    contents = make_contents()
    del contents[name]
    message = fail("mnist", write(tmp_path, contents))
    assert f"is not a complete copy of MNIST: {name} missing" in message and f"Download {CLOSED}{name}.gz" in message


DAMAGE = {
    "cut": (NAMES[0], lambda c: c[:-1], "has 23,535 bytes (unpacked); it must have 23,536"),
    "only the header's beginning": (NAMES[0], lambda c: c[:9], "has 9 bytes"),
    "too long": (NAMES[1], lambda c: c + b"12", "has more than 38 bytes (unpacked); it must have 38"),
    "empty": (NAMES[3], lambda _: b"", "begins with nothing; an idx file of bytes with 1 axes begins with 00000801"),
    "a page": (NAMES[2], lambda _: b"<html>log in</html>", "begins with 3c68746d"),
    "of floats": (NAMES[1], lambda c: c[:2] + b"\x0d" + c[3:], "begins with 00000d01"),
    "labels as images": (NAMES[0], lambda _: make_contents()[NAMES[1]], "begins with 00000801"),
    "test as train": (NAMES[0], lambda _: make_contents()[NAMES[2]], "holds 20 × 28 × 28 numbers; it must hold 30 ×"),
    "a label 10": (
        NAMES[1],
        lambda c: c[:12] + bytes([10]) + c[13:],
        "record 4 has the label 10; MNIST has labels 0..9",
    ),
}


@pytest.mark.parametrize("spelling", ["gzipped", "plain"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_content(damage, spelling, tmp_path):
    name, change, words = DAMAGE[damage]
    contents = make_contents()
    contents[name] = change(contents[name])
    message = fail("mnist", write(tmp_path, contents, SPELLINGS[spelling]))
    assert str(tmp_path / SPELLINGS[spelling](name)) in message and words in message
    assert f"download {CLOSED}{name}.gz again" in message


PACKED_DAMAGE = {
    "cut": lambda packed: packed[: len(packed) // 2],
    "checksum": lambda packed: packed[:-8] + struct.pack("<I", 0) + packed[-4:],
    "middle": lambda packed: packed[:40] + bytes(40) + packed[80:],
}


@pytest.mark.parametrize("damage", PACKED_DAMAGE)
def test_damaged_gzip(damage, tmp_path):
    path = write(tmp_path, make_contents()) / (NAMES[0] + ".gz")
    path.write_bytes(PACKED_DAMAGE[damage](path.read_bytes()))
    message = fail("mnist", tmp_path)
    assert f"{path} could not be read (" in message and f"download {CLOSED}{NAMES[0]}.gz again" in message


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_a_data_folder_without_data_is_an_error(name, tmp_path):
    message = fail(name, tmp_path, preferred="mnist")
    assert "holds no MNIST" in message and "CIFAR" not in message
    assert all(name in message for name in NAMES) and "MNIST/raw" in message and "mnist/<version>" in message
    assert "does not exist" in fail(name, tmp_path / "nowhere", preferred="mnist")
    (tmp_path / "mnist.npz").write_bytes(b"")
    assert "mnist.npz holds no MNIST" in fail(name, tmp_path / "mnist.npz", preferred="mnist")


def test_without_network_every_file_is_named():
    message = fail("mnist")
    assert "MNIST is not on this machine" in message and "pass their folder with --data-dir" in message
    assert all(f"{CLOSED}{name}.gz" in message for name in NAMES) and "holds mnist, prepared" in message


@pytest.fixture
def packed():
    return {name + ".gz": gzip.compress(content) for name, content in make_contents().items()}


@pytest.fixture
def serve(server, packed, monkeypatch):
    """Starts servers; load then looks for the files on them, in this order."""

    def start(*files):
        servers = [server(each) for each in files]
        for name, file in list(_mnist.FILES.items()):
            url, *mirrors = (one.url + name + ".gz" for one in servers)
            archive = download.Archive(url, hashlib.md5(packed[name + ".gz"]).hexdigest(), tuple(mirrors))
            monkeypatch.setitem(_mnist.FILES, name, file._replace(archive=archive))
        return servers

    return start


def test_the_files_are_downloaded_once(serve, packed):
    (one,), lines = serve(packed), []
    dataset = load("auto", preferred="mnist", log=lines.append)
    assert_is_ours(dataset)
    assert str(download.cache_folder()) in dataset.source and len(lines) == 4
    assert_is_ours(load("mnist", log=lines.append))
    assert_is_ours(load("mnist", download.cache_folder()))
    assert one.sent == list(packed) and len(lines) == 4


def test_only_what_the_cache_lacks_is_downloaded(serve, packed):
    (one,) = serve(packed)
    write(download.cache_folder(), {NAMES[3]: b"damaged"})
    for name in NAMES[:2]:
        (download.cache_folder() / f"{name}.gz").write_bytes(packed[f"{name}.gz"])
    assert_is_ours(load("mnist", **quiet))
    assert one.sent == [f"{name}.gz" for name in NAMES[2:]]


def test_the_verified_file_is_read_whatever_lies_beside_it(serve, packed):
    serve(packed)
    write(download.cache_folder(), {NAMES[0]: b"not verified"}, SPELLINGS["plain"])
    assert_is_ours(load("mnist", **quiet))


def test_with_tensorflow_one_reachable_mirror_is_enough(serve, packed, monkeypatch):
    def prepare(name):
        raise RuntimeError(f"no space for {name}")

    serve({}, packed)
    monkeypatch.setattr(_tfds_copies, "can_prepare", lambda: True)
    monkeypatch.setattr(_tfds_copies, "prepare", prepare)
    lines = []
    assert_is_ours(load("mnist", log=lines.append))
    assert any("RuntimeError: no space for mnist" in line for line in lines)
