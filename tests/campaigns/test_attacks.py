"""Files that attack: nothing is written outside, no code is run, and they are refused in one sentence.

More of them in ``tests/data/test_image_sets.py`` (paths out of an archive, a link in it, an archive that unpacks to
very much, a pickle in published files), ``test_mnist.py`` and ``test_npy.py`` (arrays of objects).
"""

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fr_jax.data._cifar_pickles import read_pickle
from fr_jax.data.image_sets import DataError, load
from fr_jax.training._saved_state import Damaged
from fr_jax.training._shards import Part, load_part

pytestmark = pytest.mark.slow


class Attack:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


TOUCH = "touch attacked"
PICKLES = {
    **{f"system, protocol {n}": pickle.dumps(Attack(os.system, TOUCH), n) for n in range(6)},
    "eval": pickle.dumps(Attack(eval, "open('attacked', 'w')")),
    "exec": pickle.dumps(Attack(exec, "open('attacked', 'w')")),
    "open": pickle.dumps(Attack(open, "attacked", "w")),
    "import": pickle.dumps(Attack(__import__, "antigravity")),
    "getattr": b"cbuiltins\ngetattr\n(cos\nposix\nVsystem\ntR.",
    "inst": b"(S'touch attacked'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch attacked'\no.",
    "below a known name": b"\x80\x04cnumpy\ndtype.__class__.__base__\n.",
    "numpy's own loader": b"cnumpy\nload\n(S'attacked'\ntR.",
    "numpy.testing's runstring": b'cnumpy.testing._private.utils\nrunstring\n(S\'open("attacked", "w")\'\n}tR.',
    "in a dictionary of CIFAR": pickle.dumps({b"labels": [1], b"data": Attack(os.system, TOUCH)}),
    "in the state of an array": b"\x80\x02cnumpy\nndarray\n)\x81cos\nsystem\nb.",
    "persistent id": b"Pattacked\n.",
    "extension code": b"\x80\x02\x82\x01.",
    "deeply nested": b"(" * 100_000 + b"." + b"t" * 100_000,
    "no end": b"\x80\x04" + b"]" * 1000,
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_no_code_of_a_pickle_is_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^(is not a pickle of CIFAR|holds a|does not have)"):
        read_pickle(content, 1, 3072)
    assert not list(tmp_path.iterdir())


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


FILE = "cifar-10-batches-bin/data_batch_1.bin"
MEMBERS = {
    "symbolic link": [member(FILE, tarfile.SYMTYPE, "/etc/passwd")],
    "hard link": [member(FILE, tarfile.LNKTYPE, "../../../etc/passwd")],
    "pipe": [member(FILE, tarfile.FIFOTYPE)],
    "character device": [member(FILE, tarfile.CHRTYPE)],
    "block device": [member(FILE, tarfile.BLKTYPE)],
    "folder": [member(FILE, tarfile.DIRTYPE)],
    "a folder that is a link": [member("cifar-10-batches-bin", tarfile.SYMTYPE, "/tmp"), member(FILE)],
    "absolute": [member("/" + FILE)],
    "upwards": [member("../" + FILE)],
    "upwards in the middle": [member("a/../../" + FILE)],
    "a name of 10,000 letters": [member("a" * 10_000 + "/" + FILE)],
    "a name with a line break": [member("a\n" + FILE)],
}


@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
def test_no_archive_writes_or_follows_anything(members, tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for one in members:
            archive.addfile(one, io.BytesIO())
    with pytest.raises(DataError) as refused:
        load("cifar10", path)
    assert "Traceback" not in str(refused.value) and os.listdir(tmp_path) == [path.name]


def test_a_gzip_file_that_unpacks_to_very_much(tmp_path):
    """A hundred MB of zeros behind the right header: what is too much is not unpacked."""
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        kind = int(name[-1])
        with gzip.open(tmp_path / f"{name}-ubyte.gz", "wb", 1) as file:
            file.write(bytes([0, 0, 8, kind]) + bytes(100 * 2**20))
    with pytest.raises(DataError, match=r"has more than|must hold|must have"):
        load("mnist", tmp_path)


def test_a_part_of_a_checkpoint_that_is_a_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").mkdir()
    for content in (np.array([Attack(os.system, TOUCH)], object), None):
        with open(tmp_path / "0" / "0.npy", "wb") as file:
            if content is None:
                pickle.dump(Attack(os.system, TOUCH), file)
            else:
                np.save(file, content, allow_pickle=True)
        with pytest.raises(Damaged, match="cannot be read"):
            load_part(tmp_path, Part("w@0", "0.npy", 0, ((0, 1),)), "float32")
    assert [path.name for path in Path().iterdir()] == ["0"]
