import os
import pathlib
import sysconfig

import numpy as np
import pytest

import fr_jax as fr
from fr_jax.data import DataError, text, text_pipeline
from fr_jax.data._text_files import PART


def everything(one: text.Text) -> bytes:
    return one.windows([0], len(one))[0].tobytes()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FR_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Twenty text files, also in folders, and some that are not text."""
    for i in range(20):
        path = tmp_path / "texts" / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Grüße aus Datei {i:02}.\n" * 10, encoding="utf-8")
    (tmp_path / "texts" / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "texts" / ".hidden").write_text("hidden")
    (tmp_path / "texts" / ".git").mkdir()
    (tmp_path / "texts" / ".git" / "config").write_text("hidden")
    (tmp_path / "texts" / "empty").touch()
    os.mkfifo(tmp_path / "texts" / "pipe")
    return tmp_path / "texts"


# The standard library


def test_the_standard_library_is_joined_once(cache):
    lines = []
    first, again = (text.load(log=lines.append) for _ in range(2))
    assert len([line for line in lines if line.startswith("Joining")]) <= 1
    assert (first.name, first.checksum, first.source) == ("python", again.checksum, again.source)
    assert {path.name for path in (cache / "text").iterdir()} == {first.train.pieces[0].path.parent.name}
    parts = [everything(first.train), everything(first.held_out)]
    assert len(first.train) > 5_000_000 and 0.05 <= len(parts[1]) / sum(map(len, parts)) <= 0.1
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for name in ("ast.py", "json/decoder.py"):
        content = (library / name).read_bytes()
        assert [content in part for part in parts].count(True) == 1
        assert sum(part.count(content) for part in parts) == 1
    for part in parts:
        part.decode("utf-8")


def test_the_same_library_makes_the_same_bytes(monkeypatch, tmp_path):
    before = text.load(log=lambda line: None)
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path))
    after = text.load(log=lambda line: None)
    assert after.train.pieces[0].path != before.train.pieces[0].path
    assert after.checksum == before.checksum and after.prompt == "def "
    assert everything(after.held_out) == everything(before.held_out)


def test_a_small_library(monkeypatch, tmp_path):
    """Tests, packages and copies are left out; another library has a folder of its own."""
    library = tmp_path / "library"
    for i in range(30):
        (library / f"m{i}.py").parent.mkdir(exist_ok=True)
        (library / f"m{i}.py").write_text(f"x = {i:03}\n")
    for other in ("test/a.py", "site-packages/b.py", "tests/c.py"):
        (library / other).parent.mkdir()
        (library / other).write_text("left out\n")
    (library / "copy.py").write_text("x = 003\n")
    (library / "latin.py").write_bytes("# ü\n".encode("latin-1"))
    (library / "data.txt").write_text("left out\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path / "cache"))
    corpus = text.load(log=lambda line: None)
    lines = (everything(corpus.train) + everything(corpus.held_out)).decode().splitlines()
    assert sorted(lines) == [f"x = {i:03}" for i in range(30)]
    assert len(corpus.held_out) in (16, 24)
    (library / "m1.py").write_text("x = 0001\n")
    assert text.load(log=lambda line: None).checksum != corpus.checksum
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 2


def test_a_library_without_source(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"has no source code of its library in .*--text"):
        text.load()


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be used .*FR_JAX_CACHE"):
        text.load(log=lambda line: None)


# The user's files


def test_folders_are_searched_in_order(folder):
    lines = []
    corpus = text.load(files=[folder], log=lines.append)
    assert lines == [f"Skipped 1 files: {folder / 'latin.txt'} is not UTF-8 (byte 2 is 0xfc)."]
    parts = [everything(part).decode() for part in (corpus.train, corpus.held_out)]
    of_files = [[int(line[-3:-1]) for line in part.splitlines()[::10]] for part in parts]
    in_order = sorted(range(20), key=lambda i: (i % 3, i))
    assert sorted(of_files[0] + of_files[1]) == list(range(20)) and len(of_files[1]) in (1, 2)
    assert all(part == [i for i in in_order if i in part] for part in of_files)
    assert "hidden" not in parts[0] + parts[1]
    assert corpus.source.startswith("text: ") and f"{len(of_files[1])} of 21 files) from {folder}" in corpus.source
    again = text.load("text", [folder, folder / "part0" / "00.txt"], log=lines.append)  # which the folder holds
    assert again.checksum == corpus.checksum and len(again.train) == len(corpus.train)


def test_the_end_of_few_files_is_held_out(tmp_path):
    paths = [tmp_path / name for name in ("b.txt", "a.txt")]
    for path in paths:
        path.write_text(path.name[0] * 500)
    corpus = text.load(files=paths)
    assert everything(corpus.train) == b"b" * 500 + b"a" * 425 and everything(corpus.held_out) == b"a" * 75
    assert "(the end of 2 files)" in corpus.source and corpus.name == "text"


def test_windows_span_files(tmp_path):
    content = bytes(np.random.default_rng(0).integers(97, 123, 1000, np.uint8))
    cuts = [0, 1, 2, 300, 301, 640, 1000]
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        (tmp_path / f"{i}.txt").write_bytes(content[start:stop])
    corpus = text.load(files=[tmp_path])
    train = corpus.train
    assert len(train) == 925 and everything(train) + everything(corpus.held_out) == content
    starts = [0, 1, 290, 299, 300, 301, 639, 640, 875]
    assert [row.tobytes() for row in train.windows(starts, 50)] == [content[s : s + 50] for s in starts]


def test_a_character_across_two_parts_of_a_file(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_bytes(b"x" * (PART - 1) + "ü".encode() + b"x")
    assert len(text.load(files=[good]).train) > PART / 2
    for content, place in ((b"x" * (PART - 1) + b"\xc3x", PART - 1), (b"x" * PART + b"\xff", PART), (b"xx\xc3", 2)):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=rf"bad.txt is not UTF-8 \(byte {place:,} is 0x"):
            text.load(files=[bad])


def test_files_of_the_same_name_are_both_used(tmp_path):
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "a.txt").write_text(f"{i:02}" * 50)
    corpus = text.load(files=[tmp_path / str(i) / "a.txt" for i in range(12)])
    assert len(corpus.train) + len(corpus.held_out) == 1200 and len(corpus.held_out) == 100


def test_many_skipped_files_are_counted(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.bin").write_bytes(b"\xff")
    (tmp_path / "a.txt").write_text("text")
    lines = []
    text.load(files=[tmp_path], log=lines.append)
    assert lines[0].startswith("Skipped 8 files: ") and lines[0].endswith("; and 3 more.")
    assert lines[0].count("is not UTF-8") == 5


def test_bad_text(tmp_path, folder):
    (tmp_path / "nothing").mkdir()
    for files, message in (
        ([tmp_path / "none.txt"], "none.txt does not exist. Give UTF-8"),
        ([folder / "latin.txt"], r"latin.txt is not UTF-8 \(byte 2 is 0xfc\).*iconv"),
        ([folder / "pipe"], "pipe is neither a file nor a folder"),
        ([tmp_path / "nothing"], "nothing has no text: 0 UTF-8 files"),
        ([folder / "empty"], "empty has no text: 1 UTF-8 files were found, all empty"),
    ):
        with pytest.raises(DataError, match=message) as error:
            text.load(files=files)
        assert "\n" not in str(error.value)
    for name, files, message in (
        ("cifar10", [], "there is no text 'cifar10'. Valid names: auto, python, text"),
        ("python", [folder], "given with --text; drop one"),
        ("text", [], "needs files: add --text"),
    ):
        with pytest.raises(DataError, match=message):
            text.load(name, files)


# Mini-batches


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The bytes 0..127 again and again."""
    path = tmp_path_factory.mktemp("counted") / "a.txt"
    path.write_bytes(bytes(range(128)) * 20)
    return text.load(files=[path])


def test_training_windows(counted):
    pipeline = text_pipeline(counted, 4, 10, seed=3)
    first, again, second = pipeline.train_batch(0), pipeline.train_batch(0), pipeline.train_batch(1)
    assert first.inputs.shape == first.targets.shape == (4, 10) and first.inputs.dtype == np.int32
    assert first.index is None
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.targets, (first.inputs + 1) % 128)
    assert not np.array_equal(first.inputs, second.inputs)
    other = text_pipeline(counted, 4, 10, seed=4).train_batch(0)
    assert not np.array_equal(first.inputs, other.inputs)
    assert pipeline.steps_per_epoch == (len(counted.train) - 1) // 10 // 4


def test_every_byte_is_drawn(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(100)))
    corpus = text.load(files=[path])
    pipeline = text_pipeline(corpus, 8, 3, seed=0)
    seen = {int(x) for step in range(100) for x in np.asarray(pipeline.train_batch(step).targets).ravel()}
    assert seen == set(range(1, len(corpus.train)))


def test_held_out_windows(counted):
    T = 10
    pipeline = text_pipeline(counted, 8, T, seed=0)
    batches = list(pipeline.test_batches())
    assert all(batch.inputs.shape == (8, T) for batch, _ in batches)
    inputs = np.concatenate([np.asarray(batch.inputs)[:valid] for batch, valid in batches])
    targets = np.concatenate([np.asarray(batch.targets)[:valid] for batch, valid in batches])
    whole = np.frombuffer(everything(counted.held_out), np.uint8)
    count = (len(whole) - 1) // T
    np.testing.assert_array_equal(inputs.ravel(), whole[: count * T])
    np.testing.assert_array_equal(targets.ravel(), whole[1 : count * T + 1])
    some = list(text_pipeline(counted, 4, T, seed=0, test_windows=6).test_batches())
    assert [valid for _, valid in some] == [4, 2]
    chosen = np.concatenate([np.asarray(batch.inputs)[:valid] for batch, valid in some])
    np.testing.assert_array_equal(chosen, inputs[np.arange(6) * count // 6])


def test_windows_split_over_devices(counted):
    (sharding,) = fr.placement(1, data_parallel=2)
    split, whole = (text_pipeline(counted, 4, 10, seed=0, sharding=where) for where in (sharding, None))
    assert split.train_batch(5).inputs.sharding == sharding
    np.testing.assert_array_equal(split.train_batch(5).inputs, whole.train_batch(5).inputs)


def test_batches_that_do_not_fit(counted):
    (sharding,) = fr.placement(1, data_parallel=2)
    with pytest.raises(ValueError, match="batch_size is 3; it must be a positive multiple of 2"):
        text_pipeline(counted, 3, 10, seed=0, sharding=sharding)
    with pytest.raises(DataError, match=r"held-out text has 192 bytes; a window has context \+ 1 = 193"):
        text_pipeline(counted, 4, 192, seed=0)
    with pytest.raises(DataError, match="training text has 2,368 bytes"):
        text_pipeline(counted, 4, 5000, seed=0)
