import functools
import hashlib
import io
import json
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from fr_jax import data
from fr_jax.data import _cifar, _digests, _mnist, _tfds_copies, download, image_sets
from fr_jax.data.image_sets import DataError, load

NAMES = ("cifar10", "cifar100")
pytestmark = pytest.mark.usefixtures("bare_machine")


def make_files(name):
    """File name -> content, with random pixels and labels."""
    layout, rng = _cifar.FORMATS[name], np.random.default_rng(7)
    contents = {}
    for file, records in {**layout.train_files, **layout.test_files}.items():
        record = rng.integers(0, 256, (records, layout.label_bytes + 3072), np.uint8)
        record[:, : layout.label_bytes] = 255  # a coarse label must never be looked at
        record[:, layout.label_bytes - 1] = rng.integers(0, layout.num_classes, records)
        contents[file] = record.tobytes()
    return contents


def write_folder(folder, contents):
    folder.mkdir(parents=True)
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return folder


def write_archive(path, members):
    """``members``: name -> content, or a ready TarInfo for what is not a plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def in_folder(name, contents):
    return {f"{_cifar.FORMATS[name].folder}/{file}": content for file, content in contents.items()}


def make_place(kind, name, root):
    """One of the forms in which a user may have the official data; what to pass as ``data_dir``."""
    layout, contents = _cifar.FORMATS[name], make_files(name)
    if kind == "folder":
        return write_folder(root / "somewhere", contents)
    if kind == "parent":
        return write_folder(root / layout.folder, contents).parent
    archive = write_archive(root / layout.archive.file_name, in_folder(name, contents))
    return archive if kind == "archive" else archive.parent


@functools.cache
def decode_slowly(name, content):
    """The layout of the official page, pixel by pixel."""
    layout = _cifar.FORMATS[name]
    size = layout.label_bytes + 3072
    images, labels = [], []
    for start in range(0, len(content), size):
        labels.append(content[start + layout.label_bytes - 1])
        pixels = content[start + layout.label_bytes : start + size]
        images.append([[[pixels[1024 * c + 32 * y + x] for c in range(3)] for x in range(32)] for y in range(32)])
    return images, labels


def fail(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_official_sizes():
    layout = _cifar.FORMATS["cifar10"]._replace(train_files={"data_batch_1.bin": 10_000}, test_files={})
    assert layout.files == {"data_batch_1.bin": 30_730_000}


def test_unknown_name():
    message = fail("CIFAR-10")
    assert "'CIFAR-10'" in message and "Did you mean 'cifar10'?" in message
    assert all(name in message for name in data.DATASETS)


def test_auto_prefers_official_data_only():
    message = fail("auto", preferred="digits")
    assert "auto cannot prefer 'digits'. Valid names: cifar10, cifar100, mnist." in message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["folder", "parent", "archive", "archive's folder"])
def test_official_files(kind, name, tmp_path):
    place = make_place(kind, name, tmp_path / "data")
    dataset = load(name, place)
    contents = make_files(name)
    train_files = _cifar.FORMATS[name].train_files
    images, labels = zip(*(decode_slowly(name, contents[file]) for file in train_files), strict=True)
    np.testing.assert_array_equal(dataset.train_images, np.concatenate(images))
    np.testing.assert_array_equal(dataset.train_labels, np.concatenate(labels))
    (test_file,) = _cifar.FORMATS[name].test_files
    np.testing.assert_array_equal(dataset.test_images, decode_slowly(name, contents[test_file])[0])
    np.testing.assert_array_equal(dataset.test_labels, decode_slowly(name, contents[test_file])[1])
    assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.dtype == np.int32
    assert (dataset.name, dataset.num_classes) == (name, _cifar.FORMATS[name].num_classes)
    assert dataset.crop and dataset.flip
    assert str(tmp_path) in dataset.source and _cifar.FORMATS[name].title in dataset.source


def md5(content):
    return hashlib.md5(content).hexdigest()


def publish(monkeypatch, name, contents):
    """Makes these the published files; who has them all is told nothing."""
    layout = _cifar.FORMATS[name]
    digests = {file: md5(content) for file, content in contents.items()}
    monkeypatch.setitem(_cifar.FORMATS, name, layout._replace(digests=digests))
    return contents


def test_all_files_have_published_digests(monkeypatch):
    monkeypatch.undo()
    for layout in _cifar.FORMATS.values():
        assert layout.digests.keys() == layout.files.keys() | layout.pickles.keys()
        for file, digest in layout.digests.items():
            assert len(digest) == (40 if file in layout.files else 32)
    assert all(len(file.md5) == 32 for file in _mnist.FILES.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_only_what_was_published_is_official(kind, name, tmp_path, monkeypatch):
    publish(monkeypatch, name, make_files(name))
    place, lines = make_place(kind, name, tmp_path / "data"), []
    assert " from the official data files in " in load(name, place, log=lines.append).source
    assert lines == []
    contents, layout = make_files(name), _cifar.FORMATS[name]
    (file,) = layout.test_files
    contents[file] = contents[file][:-1] + bytes([contents[file][-1] ^ 1])
    if kind == "folder":
        (place / file).write_bytes(contents[file])
    else:
        write_archive(place, in_folder(name, contents))
    dataset = load(name, place, log=lines.append)
    assert f"from data files in {place} that are not the official ones" in dataset.source
    assert len(lines) == 1 and f"NOT THE PUBLISHED {layout.title}: {file} in {place}" in lines[0]


def test_what_was_right_is_not_read_through_again(tmp_path, monkeypatch):
    publish(monkeypatch, "cifar10", make_files("cifar10"))
    place, compared = make_place("folder", "cifar10", tmp_path / "data"), []
    monkeypatch.setattr(
        _digests, "is_published", lambda content, digest: compared.append(digest) or md5(content) == digest
    )
    for _ in range(2):
        assert "the official" in load("cifar10", place).source
        assert len(compared) == 6
    os.utime(place / "test_batch.bin", ns=(0, 0))  # which may have been written again
    load("cifar10", place)
    assert len(compared) == 7


def test_an_archive_is_read_to_its_checksum(tmp_path):
    place = make_place("archive", "cifar10", tmp_path)
    packed = place.read_bytes()
    place.write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    assert "is not a readable .tar.gz archive (CRC check failed" in fail("cifar10", place)


def test_an_archive_that_unpacks_to_very_much_is_refused(tmp_path):
    members = in_folder("cifar10", make_files("cifar10")) | {"zeros": bytes(5 * 2**20)}
    place = write_archive(tmp_path / "a.tar.gz", members)
    assert "it unpacks to more than " in fail("cifar10", place)


@pytest.mark.parametrize("file", ["data_batch_1.bin", "mine.bin", "data_batch_1"])
def test_a_single_file_is_named_as_such(file, tmp_path):
    (tmp_path / file).write_bytes(make_files("cifar10")["data_batch_1.bin"])
    message = fail("cifar10", tmp_path / file)
    assert f"{file} is a single file" in message and f"such as {tmp_path}" in message and "archive" not in message


def python_2(name, file, content, labels_name=b"labels"):
    """The pickle that Python 2 and NumPy 1.6 wrote for CIFAR, instruction by instruction (protocol 2)."""
    layout = _cifar.FORMATS[name]
    records = np.frombuffer(content, np.uint8).reshape(-1, layout.label_bytes + 3072)
    n, raw = len(records), records[:, layout.label_bytes :].tobytes()
    text = lambda word: b"U" + bytes([len(word)]) + word
    number = lambda value: b"K" + bytes([value]) if value < 256 else b"M" + value.to_bytes(2, "little")
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += (
        b"(K\x01" + number(n) + number(3072) + b"\x86" + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    )
    labels = b"](" + b"".join(map(number, records[:, layout.label_bytes - 1])) + b"e"
    names = b"](" + b"".join(text(b"image_%d.png" % i) for i in range(n)) + b"e"
    return (
        b"\x80\x02}(" + text(b"batch_label") + text(b"training batch") + text(labels_name) + labels
        + text(b"data") + array + text(b"filenames") + names + b"u."
    )  # fmt: skip


def make_pickles(name):
    labels = b"labels" if name == "cifar10" else b"fine_labels"
    return {file[:-4]: python_2(name, file, content, labels) for file, content in make_files(name).items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["folder", "parent", "archive", "archive's folder"])
def test_the_python_version_is_read(kind, name, tmp_path, monkeypatch):
    layout, pickles = _cifar.FORMATS[name], publish(monkeypatch, name, make_pickles(name))
    assert pickle.loads(next(iter(pickles.values())), encoding="bytes")[b"data"].dtype == np.uint8
    expected = load(name, make_place("folder", name, tmp_path / "binary"))
    if "archive" in kind:
        members = {f"{layout.python_folder}/{file}": content for file, content in pickles.items()}
        place = write_archive(tmp_path / layout.python_archive.file_name, members)
    else:
        place = write_folder(tmp_path / layout.python_folder, pickles)
    dataset = load(name, place.parent if kind in ("parent", "archive's folder") else place)
    for a, b in zip(dataset[1:5], expected[1:5], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert "the official data files" in dataset.source


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


@pytest.mark.parametrize("published", [False, True])
def test_no_code_of_a_pickle_is_run(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickles = make_pickles("cifar10") | {"data_batch_3": pickle.dumps({b"labels": [], b"data": Attack()})}
    if published:
        publish(monkeypatch, "cifar10", pickles)
    message = fail("cifar10", write_folder(tmp_path / "cifar-10-batches-py", pickles))
    assert (
        "data_batch_3 is not a pickle of CIFAR (it asks for pathlib" if published else "they are not read. Download"
    ) in message
    assert "cifar-10-binary.tar.gz" in message or "cifar-10-python.tar.gz" in message
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps([1]), "holds a list and not a dictionary"),
        (pickle.dumps({b"labels": [1] * 29}), "does not have a list of 30 labels"),
        (pickle.dumps({b"labels": [1] * 30}), "does not have 30 images of 3,072 bytes"),
        (pickle.dumps({b"labels": [1] * 30, b"data": np.zeros((29, 3072), np.uint8)}, 3), "does not have 30 images"),
        (pickle.dumps({b"labels": [1] * 30, b"data": np.zeros((30, 3072), np.int8)}, 3), "does not have 30 images"),
        (
            pickle.dumps({b"labels": [10] * 30, b"data": np.zeros((30, 3072), np.uint8)}, 3),
            "record 0 of test_batch has the label 10",
        ),
        (b"\x80\x02}(", "is not a pickle of CIFAR"),
        (b"", "is not a pickle of CIFAR"),
    ],
)
def test_another_structure_of_a_pickle_is_named(content, said, tmp_path, monkeypatch):
    small = _cifar.FORMATS["cifar10"]._replace(test_files={"test_batch.bin": 30})
    monkeypatch.setitem(_cifar.FORMATS, "cifar10", small)
    pickles = publish(monkeypatch, "cifar10", make_pickles("cifar10") | {"test_batch": content})
    assert said in fail("cifar10", write_folder(tmp_path / "cifar-10-batches-py", pickles))


def test_auto_takes_cifar10_from_the_data_folder(tmp_path):
    assert load("auto", str(make_place("folder", "cifar10", tmp_path))).name == "cifar10"


def test_mean_and_std():
    images = np.random.default_rng(1).integers(0, 256, (2000, 4, 4, 3), np.uint8)  # two blocks of the histogram
    mean, std = image_sets._mean_and_std(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32


def test_a_constant_channel_can_be_normalised(tmp_path):
    contents = {file: bytes(len(content)) for file, content in make_files("cifar10").items()}
    dataset = load("cifar10", write_folder(tmp_path / "black", contents))
    np.testing.assert_array_equal(dataset.std, [1, 1, 1])


def test_missing_file(tmp_path):
    place = make_place("folder", "cifar10", tmp_path)
    (place / "data_batch_3.bin").unlink()
    assert "data_batch_3.bin missing" in fail("cifar10", place)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    place = make_place("folder", "cifar10", tmp_path)
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "data_batch_1.bin cannot be read: Permission denied" in fail("cifar10", place)


@pytest.mark.parametrize(("change", "found"), [(lambda c: c[:-1], "92,189"), (lambda c: c + c[:3073], "95,263")])
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_wrong_size(kind, change, found, tmp_path):
    contents = make_files("cifar10")
    contents["data_batch_2.bin"] = change(contents["data_batch_2.bin"])
    if kind == "folder":
        place = write_folder(tmp_path / "data", contents)
    else:
        place = write_archive(tmp_path / "any-name.tgz", in_folder("cifar10", contents))
    message = fail("cifar10", place)
    assert f"data_batch_2.bin has {found} bytes" in message and "must have 92,190" in message


@pytest.mark.parametrize(("name", "file", "label"), [("cifar10", "test_batch.bin", 10), ("cifar100", "train.bin", 100)])
def test_wrong_label(name, file, label, tmp_path):
    contents, layout = make_files(name), _cifar.FORMATS[name]
    damaged = bytearray(contents[file])
    damaged[4 * (layout.label_bytes + 3072) + layout.label_bytes - 1] = label
    message = fail(name, write_folder(tmp_path / "data", contents | {file: bytes(damaged)}))
    assert f"record 4 of {file} has the label {label}" in message and f"0..{label - 1}" in message


def test_archive_with_a_link(tmp_path):
    link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = {"link": link} | in_folder("cifar10", make_files("cifar10"))
    assert "data_batch_1.bin is not a plain file" in fail("cifar10", write_archive(tmp_path / "a.tar.gz", members))


def test_archive_paths_are_not_followed(tmp_path):
    contents = make_files("cifar10")
    evil = {f"../{file}": b"x" for file in contents} | {f"/{file}": b"x" for file in contents} | {"../evil.txt": b"x"}
    place = write_archive(tmp_path / "a" / "a.tar.gz", evil | in_folder("cifar10", contents))
    before = sorted(tmp_path.rglob("*"))
    assert load("cifar10", place).name == "cifar10"
    assert sorted(tmp_path.rglob("*")) == before
    assert "test_batch.bin missing" in fail("cifar10", write_archive(tmp_path / "b" / "b.tar.gz", evil))


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"<html>no</html>"])
def test_damaged_archive(damage, tmp_path):
    place = make_place("archive", "cifar10", tmp_path)
    place.write_bytes(damage(place.read_bytes()))
    assert "is not a readable .tar.gz archive" in fail("cifar10", place)


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_a_data_folder_without_data_is_an_error(name, tmp_path):
    assert "holds no CIFAR-10" in fail(name, tmp_path)
    assert "does not exist" in fail(name, tmp_path / "nowhere")


def test_auto_without_network_is_digits_and_says_so():
    lines = []
    begin = time.monotonic()
    dataset = load(log=lines.append)
    assert time.monotonic() - begin < 60  # does not wait for a network, also on a loaded machine
    assert dataset.name == "digits" and "scikit-learn" in dataset.source
    assert len(lines) == 1 and "\n" not in lines[0]
    assert "NO CIFAR-10" in lines[0] and "no connection to 127.0.0.1" in lines[0] and "digits" in lines[0]


@pytest.mark.parametrize(
    ("preferred", "title"), [("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100"), ("mnist", "MNIST")]
)
def test_auto_names_the_data_that_were_preferred(preferred, title):
    lines = []
    assert load("auto", preferred=preferred, log=lines.append).name == "digits"
    (line,) = lines
    assert (
        f"NO {title}: not on this machine" in line
        and f"nothing about {title}." in line
        and f"ask for {preferred} by name" in line
    )
    assert ("it is not MNIST" in line) == (preferred == "mnist")


@pytest.mark.parametrize("name", [*NAMES, "mnist"])
def test_by_name_without_network_is_an_error_that_helps(name):
    message = fail(name)
    assert "no connection to 127.0.0.1" in message
    assert all(f"({i})" in message for i in (1, 2, 3))
    assert "--data-dir" in message and "--dataset digits" in message


def test_digits():
    dataset, again = load("digits"), load("digits")
    assert dataset.train_images.shape == (1433, 32, 32, 3) and dataset.test_images.shape == (364, 32, 32, 3)
    assert dataset.train_images.max() == 255
    assert dataset.crop and not dataset.flip
    for a, b in zip(dataset[1:5], again[1:5], strict=True):
        np.testing.assert_array_equal(a, b)
    share = np.bincount(dataset.test_labels) / (np.bincount(dataset.train_labels) + np.bincount(dataset.test_labels))
    np.testing.assert_allclose(share, 0.2, atol=0.005)


def test_synthetic_is_deterministic_and_learnable():
    dataset, again = load("synthetic"), load("synthetic")
    np.testing.assert_array_equal(dataset.train_images, again.train_images)
    assert dataset.train_images.shape == (10_000, 32, 32, 3) and dataset.test_images.shape == (2_000, 32, 32, 3)
    train, test = (images[:, ::4, ::4].reshape(len(images), -1) / 255 for images in (dataset[1], dataset[3]))
    centres = np.stack([train[dataset.train_labels == label].mean(axis=0) for label in range(10)])
    nearest = np.argmin(np.square(centres).sum(axis=1) - 2 * test @ centres.T, axis=1)
    assert (nearest == dataset.test_labels).mean() > 0.9


def test_a_data_folder_for_digits_is_mentioned(tmp_path):
    lines = []
    load("digits", tmp_path, log=lines.append)
    assert "not used" in lines[0]


@pytest.fixture
def serve(server, tmp_path, monkeypatch):
    """Starts a server; load then downloads the official archive from it."""
    layout = _cifar.FORMATS["cifar10"]
    content = make_place("archive", "cifar10", tmp_path / "server").read_bytes()
    one = server({layout.archive.file_name: content})
    official = download.Archive(one.url + layout.archive.file_name, hashlib.md5(content).hexdigest())
    monkeypatch.setitem(_cifar.FORMATS, "cifar10", layout._replace(archive=official))
    return one


def test_the_archive_is_downloaded_once(serve):
    lines = []
    assert load("auto", log=lines.append).name == "cifar10"
    assert len(lines) == 1 and serve.url in lines[0]
    assert load("cifar10", log=lines.append).name == "cifar10"
    assert serve.sent == ["cifar-10-binary.tar.gz"] and len(lines) == 1


def write_tfds_copy(data_dir, name="cifar10", *, file_format="array_record", labels_from=0, train=150, test=20):
    """A prepared copy as TFDS 4.9 with TensorFlow writes it (compared with one of those, of CIFAR-10)."""
    import PIL.Image
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder, shape = data_dir / name / "3.0.2", (28, 28, 1) if name == "mnist" else (32, 32, 3)
    folder.mkdir(parents=True)
    rng, splits, images = np.random.default_rng(3), [], []
    for split, count in (("train", train), ("test", test)):
        images.append(rng.integers(0, 256, (count, *shape), np.uint8))
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        for i, image in enumerate(images[-1]):
            png, example = io.BytesIO(), tf_example_pb2.Example()
            PIL.Image.fromarray(image.squeeze()).save(png, "png")
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature["label"].int64_list.value.append(labels_from + i % 10)
            if name != "mnist":
                example.features.feature["id"].bytes_list.value.append(b"name")
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        splits.append({"name": split, "numBytes": "1", "shardLengths": [str(count)], "filepathTemplate": template})
    info = {"name": name, "version": "3.0.2", "fileFormat": file_format, "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    module, dimensions = "tensorflow_datasets.core.features.", {"dimensions": [str(length) for length in shape]}
    image = {"pythonClassName": module + "image_feature.Image", "image": {"dtype": "uint8", "shape": dimensions}}
    label = {"pythonClassName": module + "class_label_feature.ClassLabel", "classLabel": {"numClasses": "10"}}
    text = {"pythonClassName": module + "text_feature.Text", "text": {}}
    parts = {"image": image, "label": label} | ({} if name == "mnist" else {"id": text})
    features = {"pythonClassName": module + "features_dict.FeaturesDict", "featuresDict": {"features": parts}}
    (folder / "features.json").write_text(json.dumps(features))
    return images


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
@pytest.mark.parametrize("given", [True, False])
def test_a_tfds_copy_is_read_without_tensorflow(given, name, tmp_path):
    train_images, test_images = write_tfds_copy(tmp_path / "tfds", name)
    dataset = load(name, tmp_path / "tfds" if given else None)
    np.testing.assert_array_equal(dataset.train_images, train_images)
    np.testing.assert_array_equal(dataset.test_images, test_images)
    np.testing.assert_array_equal(dataset.train_labels, np.arange(150) % 10)
    assert dataset.name == name and "TFDS" in dataset.source and "3.0.2" in dataset.source


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"file_format": "tfrecord"}, "only TensorFlow reads"),
        ({"labels_from": 3}, "labels {10, 11, 12}"),
        ({"train": 9}, "holds 9"),
    ],
)
def test_a_tfds_copy_that_cannot_be_used(how, words, tmp_path, serve):
    write_tfds_copy(tmp_path / "tfds", **how)
    assert words in fail("cifar10", tmp_path / "tfds")
    lines = []
    assert "official archive" in load("cifar10", log=lines.append).source
    assert "Skipping" in lines[0] and words in lines[0]


def test_a_tfds_copy_without_its_files(tmp_path):
    write_tfds_copy(tmp_path / "tfds")
    for path in (tmp_path / "tfds").rglob("*array_record*"):
        path.write_bytes(b"")
    assert "could not be read as a TFDS copy" in fail("cifar10", tmp_path / "tfds")


def test_with_tensorflow_the_download_goes_through_tfds(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(_tfds_copies, "can_prepare", lambda: True)
    monkeypatch.setattr(_tfds_copies, "prepare", lambda _: write_tfds_copy(tmp_path / "tfds") and None)
    assert "TFDS" in load("auto", log=lambda _: None).source


def test_where_tfds_fails_the_archive_is_fetched(serve, monkeypatch):
    def prepare(name):
        raise RuntimeError("no space in TensorFlow")

    monkeypatch.setattr(_tfds_copies, "can_prepare", lambda: True)
    monkeypatch.setattr(_tfds_copies, "prepare", prepare)
    lines = []
    assert "official archive" in load("auto", log=lines.append).source
    assert any("RuntimeError: no space in TensorFlow" in line for line in lines)


def test_with_tensorflow_and_without_network_tfds_is_not_started(monkeypatch):
    monkeypatch.setattr(_tfds_copies, "can_prepare", lambda: True)
    monkeypatch.setattr(_tfds_copies, "prepare", lambda _: pytest.fail("TFDS would wait for the network"))
    lines = []
    assert load("auto", log=lines.append).name == "digits"
    assert len(lines) == 1 and "no connection to 127.0.0.1" in lines[0]


@pytest.mark.skipif("FR_JAX_TEST_DATA" not in os.environ, reason="FR_JAX_TEST_DATA does not name the real CIFAR-10")
def test_real_cifar10(monkeypatch):
    monkeypatch.undo()
    dataset = load("cifar10", Path(os.environ["FR_JAX_TEST_DATA"]))
    assert "from the official data files in" in dataset.source
    assert dataset.train_images.shape == (50_000, 32, 32, 3) and dataset.test_images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), 5000)
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), 1000)
    # The figures that everyone normalises CIFAR-10 with.
    np.testing.assert_allclose(dataset.mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(dataset.std, [0.2470, 0.2435, 0.2616], atol=1e-4)
