"""The parts of a state that processes write and read for themselves, and checkpoints made of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fr_jax as fr
from fr_jax.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, free_port
from fr_jax.training._saved_state import Damaged, checksum, described, sealed
from fr_jax.training._shards import Part, entry_of, own_parts, parts_of, read_parts, unpack_parts, write_parts
from fr_jax.training.checkpoints import CheckpointError, Checkpoints

SCRIPT = str(Path(__file__).with_name("shards_script.py"))


def laid(x, *axes, devices=4):
    (sharding,) = fr.placement(1, jax.devices()[:devices], devices, shard_params=True)
    return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec(*axes)))


def state_of(devices, rows, columns):
    return {
        "kernel": laid(jnp.arange(96.0).reshape(8, 12), *rows, devices=devices),
        "bias": laid(jnp.arange(8, dtype=jnp.bfloat16), *columns, devices=devices),
        "key": laid(jax.random.key(7), devices=devices),
        "count": laid(jnp.int32(11), devices=devices),
        "step": 5,
    }


def test_parts_cover_an_array_once():
    array = laid(jnp.zeros((8, 12)), None, "shards")
    parts = parts_of({"a": array, "b": laid(jnp.zeros(3))})
    assert [part.bounds for part in parts["a"]] == [((0, 8), (3 * i, 3 * i + 3)) for i in range(4)]
    assert {part.process for part in parts["a"]} == {0} and parts["a"][2].name == "a@2"
    assert parts["b"] == [Part("b@0", "4.npy", 0, ((0, 3),))]  # on four devices, written once


@pytest.mark.parametrize("devices", [2, 4])
def test_a_state_comes_back_on_other_devices(devices, tmp_path):
    """Bit for bit, split along another axis over another number of devices, keys and narrow types included."""
    saved = state_of(4, (None, "shards"), ("shards",))
    entries, arrays = described(saved)
    parts = parts_of(arrays)
    own = own_parts(arrays, parts)
    write_parts(tmp_path / "0", own)
    checksums = {part.name: checksum(array) for part, array in own.items()}
    for name, array in arrays.items():
        entries[name] |= entry_of(parts[name], array, checksums)
    index = json.loads(json.dumps(sealed(5, entries, {}, "parts-5-x")))
    template = state_of(devices, ("shards", None), ())
    found = read_parts(index, template, (), tmp_path, whole=False)
    back = unpack_parts(index, found, template, ())
    assert back["step"] == 5
    for name in ("kernel", "bias", "key", "count"):
        assert back[name].sharding == template[name].sharding
        data = jax.random.key_data if name == "key" else lambda x: x
        np.testing.assert_array_equal(data(back[name]), data(saved[name]))
    file = tmp_path / "0" / parts["kernel"][1].file
    whole = file.read_bytes()
    for damaged, said in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "the checksum differs for kernel@1"),
        (whole[:-1], "cannot be read"),
        (b"", "cannot be read"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(Damaged, match=said):
            read_parts(index, template, (), tmp_path, whole=False)
    file.unlink()
    with pytest.raises(Damaged, match="is missing"):
        read_parts(index, template, (), tmp_path, whole=False)


def as_two(program_env, folder, *words):
    """What the script prints in each of two processes."""
    group = {COORDINATOR: f"127.0.0.1:{free_port()}", NUM_PROCESSES: "2"}
    started = []
    for i in range(2):
        env = program_env | group | {PROCESS_ID: str(i)}
        command = [sys.executable, SCRIPT, str(folder), *words]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = [process.communicate(timeout=100) for process in started]
    assert not any(process.returncode for process in started), [err[-2000:] for _, err in ended]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.slow
def test_each_process_writes_its_own(program_env, tmp_path):
    """Saved by two processes, restored by two and by one; a damaged part makes all take the checkpoint before."""
    folder = tmp_path / "checkpoints"
    first, second = as_two(program_env, folder, "save")
    assert first["wrote"] and second["wrote"] and not set(first["wrote"]) & set(second["wrote"])
    assert sorted(path.name.split("-")[1] for path in folder.glob("parts-*")) == ["2", "3"]  # of the two that are kept
    assert not list(folder.glob(".seen-*"))
    for found in as_two(program_env, folder, "restore"):
        assert (found["step"], found["equal"]) == (3, True)
    template = {"a": jnp.zeros((8, 4)), "b": np.zeros(6, np.float32), "key": jax.random.key(0), "n": 0}
    warned = []
    with Checkpoints(folder, warn=warned.append) as checkpoints:
        restored = checkpoints.restore(template)
    assert restored.step == 3 and restored.state["n"] == 3
    np.testing.assert_array_equal(restored.state["a"], 3.0 + np.arange(32).reshape(8, 4))
    np.testing.assert_array_equal(restored.state["b"], 3.0 * np.arange(6))

    newest = next(folder.glob("parts-3-*"))
    missing = min((newest / "1").iterdir()).name
    shutil.rmtree(newest / "1")
    for found in as_two(program_env, folder, "restore"):
        assert (found["step"], found["equal"]) == (2, True)
    with Checkpoints(folder, warn=warned.append) as checkpoints:
        assert checkpoints.restore(template).step == 2
    assert warned == [
        f"The checkpoint of step 3 in {folder} is damaged (process 0: {newest.name}/1/{missing} is missing); "
        "trying the one of step 2."
    ]
    shutil.rmtree(next(folder.glob("parts-2-*")))
    with Checkpoints(folder, warn=warned.append) as checkpoints, pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.restore(template)


@pytest.mark.slow
def test_a_folder_that_not_all_see(program_env, tmp_path):
    """As before: process 0 writes everything, and reads everything."""
    folder = tmp_path / "checkpoints"
    as_two(program_env, folder, "save", "private")
    assert not list(folder.glob("parts-*"))
    for found in as_two(program_env, folder, "restore", "private"):
        assert (found["step"], found["equal"]) == (3, True)
    as_two(program_env, folder, "save", "again")
    assert list(folder.glob("parts-*"))
    for found in as_two(program_env, folder, "restore", "private"):  # copied to where only process 0 sees it
        assert (found["step"], found["equal"]) == (5, True)
