import errno
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fr_jax.algorithms._validation import BatchSpec
from fr_jax.training._orbax import quiet_orbax
from fr_jax.training.checkpoints import CheckpointError, Checkpoints


class MadeUpState(NamedTuple):
    step: int
    params: tuple[Any, ...]
    opt_state: tuple[Any, ...]
    history: tuple[Any, ...]
    key: jax.Array
    spec: BatchSpec


def made_up_state(step: int = 0, seed: int = 0, width: int = 5) -> MadeUpState:
    """Three stages: two on devices of their own, one split over a mesh of two; all kinds of leaves."""
    devices = jax.devices()
    mesh = jax.make_mesh((2,), ("data",), devices=devices[4:6], axis_types=(jax.sharding.AxisType.Auto,))
    places = (devices[1], devices[3], NamedSharding(mesh, PartitionSpec("data")))
    random = np.random.default_rng(seed)
    params = tuple(
        jax.device_put({"Conv_0": {"kernel": random.normal(size=(4, width)).astype(np.float32)}}, place)
        for place in places
    )
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.adam(0.1))
    bits = random.integers(0, 2**16, size=(2, 3), dtype=np.uint16)
    history = (
        jax.device_put(bits.view(ml_dtypes.bfloat16), places[0]),
        jax.device_put(random.integers(-9, 9, size=(4,), dtype=np.int8), places[1]),
        jax.device_put(np.zeros((0, 3), np.float32), places[1]),
        random.normal(size=(3,)),  # float64
        {"flag": random.random() < 0.5, "rate": random.normal(), "nothing": None},
    )
    spec = BatchSpec(((2, 3), "float32"), ((2,), "int32"))
    key = jax.device_put(jax.random.split(jax.random.key(seed), 3), places[1])
    return MadeUpState(step, params, tuple(optimizer.init(p) for p in params), history, key, spec)


def assert_identical(actual: Any, expected: Any) -> None:
    """Same structure, bits, dtypes, weak types and places."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(e)
        if isinstance(e, jax.Array):
            assert (a.sharding, a.committed) == (e.sharding, e.committed)
            if jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
                a, e = jax.random.key_data(a), jax.random.key_data(e)
            assert (a.aval, a.weak_type) == (e.aval, e.weak_type)
        if hasattr(e, "dtype"):
            assert (a.dtype, a.shape) == (e.dtype, e.shape)
            assert np.asarray(a).tobytes() == np.asarray(e).tobytes()
        else:
            assert a == e


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def index_file(folder: pathlib.Path) -> pathlib.Path:
    return next(path for path in files_of(folder / "index") if b'"leaves"' in path.read_bytes())


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max(files_of(folder / "state"), key=lambda path: path.stat().st_size)


def flip_byte(path: pathlib.Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def test_round_trip_is_bit_identical_and_in_place(tmp_path):
    state = made_up_state(step=7, seed=1)
    metadata = {"seed": 1, "lr": 0.1, "nested": {"a": [1, None, "x"]}, "nan": float("inf")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, metadata)
    # A new object and a template of other values: nothing may come from memory.
    restored = Checkpoints(tmp_path).restore(made_up_state())
    assert_identical(restored.state, state)
    assert type(restored.state.step) is int
    assert (restored.step, restored.metadata) == (7, metadata)


def test_only_some_fields_are_read(tmp_path):
    """What is in flight may have another form there."""
    saved = {"params": (jnp.arange(3.0),), "in_flight": jnp.ones((2, 2)), "step": 5}
    template = {"params": (jnp.zeros(3),), "in_flight": jnp.zeros(4), "more": jnp.zeros(1), "step": 0}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, saved, {})
        with pytest.raises(CheckpointError, match="in_flight is"):
            checkpoints.restore(template)
        found = checkpoints.restore(template, only=("params", "step")).state
        with pytest.raises(CheckpointError, match="params/0 is"):
            checkpoints.restore(template | {"params": (jnp.zeros(2),)}, only=("params",))
        assert checkpoints.restore(template, only="params").state["step"] == 0
        for wrong in ("param", ("step", "param")):
            with pytest.raises(ValueError, match=r"only = .* fields of the state: in_flight, more, params"):
                checkpoints.restore(template, only=wrong)
    chex.assert_trees_all_equal(found, template | {"params": saved["params"], "step": 5})


def test_float64_and_numpy_scalars(tmp_path, x64):
    state = {"x": jnp.linspace(0, 1, 7), "n": np.int32(3), "s": "text"}
    assert state["x"].dtype == jnp.float64
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore({"x": jnp.zeros(7), "n": np.int32(0), "s": ""}).state
    assert_identical(restored, state)


def test_the_file_is_readable_by_name_without_our_classes(tmp_path):
    import orbax.checkpoint as ocp

    state = made_up_state(seed=3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
    with ocp.CheckpointManager(tmp_path) as manager:
        arrays = manager.restore(3, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    np.testing.assert_array_equal(arrays["params/2/Conv_0/kernel"], state.params[2]["Conv_0"]["kernel"])
    np.testing.assert_array_equal(arrays["key"], jax.random.key_data(state.key))


def test_placement_is_the_templates(tmp_path):
    here, there = jax.devices()[1], jax.devices()[6]
    values = jnp.arange(4.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, (jax.device_put(values, here), jax.device_put(jax.random.key(5), here)), {})
        restored = checkpoints.restore(jax.device_put((jnp.zeros(4), jax.random.key(0)), there)).state
    assert all(leaf.devices() == {there} for leaf in restored)
    np.testing.assert_array_equal(restored[0], values)
    np.testing.assert_array_equal(jax.random.key_data(restored[1]), jax.random.key_data(jax.random.key(5)))


@pytest.mark.parametrize("committed", [False, True])
def test_a_restored_state_does_not_recompile(tmp_path, committed):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))
    weak = jnp.broadcast_to(jnp.asarray(2.0), (3,))
    state = {"weak": weak, "weak_int": jnp.asarray(1), "strong": jnp.ones(3), "count": jnp.zeros((), jnp.int32)}
    assert weak.weak_type
    if committed:
        state = jax.device_put(state, jax.devices()[2])
    stepped = step(step(state))
    compiled = step._cache_size()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, stepped, {})
        restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state) if not committed else state).state
    assert_identical(restored, stepped)
    step(restored)
    assert step._cache_size() == compiled


def test_donating_after_save_and_after_restore(tmp_path):
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    x = step(jax.device_put(jnp.arange(1024.0), jax.devices()[1]))
    expected = np.array(x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, x, {})
        after = np.array(step(x))
        assert x.is_deleted() or jax.__version_info__ >= (0, 11)  # which copies what NumPy has looked at
        restored = checkpoints.restore(jax.device_put(jnp.zeros(1024), jax.devices()[1])).state
        np.testing.assert_array_equal(restored, expected)
        np.testing.assert_array_equal(step(restored), after)
        np.testing.assert_array_equal(checkpoints.restore(after).state, expected)


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path / "deep" / "er", keep=2) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore({"x": 0}) is None
        for step in (1, 2, 10):
            checkpoints.save(step, {"x": step}, {})
        assert checkpoints.steps() == [2, 10]
        assert checkpoints.restore({"x": 0}).state == {"x": 10}
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_the_same_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for value in (1.0, 2.0):
            checkpoints.save(5, {"x": jnp.float32(value)}, {"value": value})
        restored = checkpoints.restore({"x": jnp.float32(0)})
    assert (float(restored.state["x"]), restored.metadata) == (2.0, {"value": 2.0})
    assert os.listdir(tmp_path) == ["5"]


def test_an_older_step_than_the_newest_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(8, {"x": 1}, {})
        with pytest.raises(CheckpointError, match=r"later steps \(8\) than step 3"):
            checkpoints.save(3, {"x": 1}, {})
        assert checkpoints.steps() == [8]


def truncate(folder: pathlib.Path) -> None:
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip_data(folder: pathlib.Path) -> None:
    path = largest_file(folder)
    flip_byte(path, path.stat().st_size // 2)


def flip_index(folder: pathlib.Path) -> None:
    path = index_file(folder)
    flip_byte(path, path.read_bytes().index(b'"metadata"') + 3)


def change_metadata(folder: pathlib.Path) -> None:
    path = index_file(folder)
    path.write_bytes(path.read_bytes().replace(b'"seed": 20', b'"seed": 21').replace(b'"seed":20', b'"seed":21'))


def swap_arrays(folder: pathlib.Path) -> None:
    """Sound files with the arrays of another step: only our own checksums can tell."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.with_name("10") / "state", folder / "state")


def empty_folder(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def unknown_type(folder: pathlib.Path) -> None:
    """Of the last array: orbax then fails between coroutines that it has made and not awaited."""
    path = folder / "state" / "_METADATA"
    before, _, after = path.read_text().rpartition("np.ndarray")
    path.write_text(f"{before}np.ndarraq{after}")


DAMAGES = {
    "truncated": truncate,
    "flipped data": flip_data,
    "flipped index": flip_index,
    "changed metadata": change_metadata,
    "arrays of another step": swap_arrays,
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "no index": lambda folder: shutil.rmtree(folder / "index"),
    "no manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "an array of no known type": unknown_type,
    "empty index": lambda folder: os.truncate(index_file(folder), 0),
    "empty folder": empty_folder,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, damage):
    warnings: list[str] = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, made_up_state(step, seed=step), {"seed": step})
    damage(tmp_path / "20")
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        restored = checkpoints.restore(made_up_state())
        assert_identical(restored.state, made_up_state(10, seed=10))
        assert (restored.step, restored.metadata) == (10, {"seed": 10})
        assert len(warnings) == 1
        assert "step 20" in warnings[0]
        assert "damaged (" in warnings[0]
        assert "step 10" in warnings[0]
        assert checkpoints.steps() == [10, 20]  # looking changes nothing
        # The resumed run comes to step 20 again.
        checkpoints.save(15, made_up_state(15, seed=15), {"seed": 15})
        checkpoints.save(20, made_up_state(20, seed=20), {"seed": 20})
        assert checkpoints.steps() == [15, 20]
        assert (tmp_path / "damaged-20").is_dir()
        assert_identical(checkpoints.restore(made_up_state()).state, made_up_state(20, seed=20))
    assert len(warnings) == 1


def test_all_damaged(tmp_path):
    warnings: list[str] = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, made_up_state(step), {})
            truncate(tmp_path / str(step))
        with pytest.raises(CheckpointError, match=r"every checkpoint .* \(steps 1, 2\) is damaged"):
            checkpoints.restore(made_up_state())
    assert len(warnings) == 2
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.mark.parametrize(
    ("saved", "template", "says"),
    [
        ({"a": np.zeros((2, 3)), "b": 1}, {"a": np.zeros((2, 4)), "b": 1}, r"a is float64\[2,3\].* and float64\[2,4\]"),
        ({"a": np.float32(0)}, {"a": np.float64(0)}, r"a is float32\[\] in the checkpoint and float64\[\] here"),
        ({"a": 1}, {"a": np.int64(1)}, r"a is int in the checkpoint and int64\[\] here"),
        ({"a": 1, "b": {"c": 2.0}}, {"a": 1}, r"b/c \(float\) is only in the checkpoint"),
        ({"a": 1}, {"a": 1, "d": (0, True)}, r"d/0 \(int\) is not in the checkpoint; d/1 \(bool\) is not"),
        ({"a": list(range(9))}, {"a": []}, r"a/3 \(int\) is only in the checkpoint; and 5 more"),
    ],
)
def test_another_structure_is_an_error_not_damage(tmp_path, saved, template, says):
    warnings: list[str] = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        checkpoints.save(1, template, {})
        checkpoints.save(2, saved, {})
        with pytest.raises(CheckpointError, match=says) as error:
            checkpoints.restore(template)
    assert "step 2" in str(error.value)
    assert warnings == []


def test_another_kind_of_key_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(CheckpointError, match=r"key is key<threefry2x32>\[\] in the checkpoint and key<rbg>"):
            checkpoints.restore({"key": jax.random.key(0, impl="rbg")})


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a/b": 1, "a": {"b": 2}}, "two leaves"),
        ({"a/0": 1, "a": 2}, "'a' is a leaf of the state and a part of 'a/0'"),
        ({"f": len}, "f of the state is a builtin_function_or_method"),
    ],
)
def test_states_that_cannot_be_stored(tmp_path, state, says):
    with pytest.raises(CheckpointError, match=says):
        Checkpoints(tmp_path / "c").save(1, state, {})
    with pytest.raises(TypeError):
        Checkpoints(tmp_path / "c").save(1, {"x": 1}, {"f": len})
    assert not (tmp_path / "c").exists()


def random_state(megabytes: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"w{i}": random.random(int(megabytes * 125_000 / 20)) for i in range(20)}  # does not compress well


def assert_survives_a_failed_save(checkpoints: Checkpoints, folder: pathlib.Path, fail: Any, says: str) -> None:
    for step in (1, 2):
        checkpoints.save(step, random_state(0.3), {"step": step})
    before = {path: path.read_bytes() for path in files_of(folder)}
    threads = []
    for step in (2, 3, 2, 3):  # one that replaces, one that is new
        with pytest.raises(CheckpointError, match=says) as error:
            fail(step)
        assert "earlier checkpoint of step 2 is intact" in str(error.value)
        assert {path: path.read_bytes() for path in files_of(folder)} == before
        assert sorted(os.listdir(folder)) == ["1", "2"]
        threads.append(threading.active_count())  # the first may have started pools that stay
    assert threads[-1] < threads[0] + 3, threads
    assert checkpoints.restore(random_state(0.3)).step == 2
    checkpoints.save(3, random_state(0.3), {})
    assert checkpoints.steps() == [2, 3]


def test_a_full_disk(tmp_path, capfd):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with Checkpoints(tmp_path) as checkpoints:

            def fail(step: int) -> None:
                checkpoints.save(step, random_state(3), {})

            says = r"^disk full: the checkpoint of step \d \(3.0 MB\) .* free 1\.\d MB"
            assert_survives_a_failed_save(checkpoints, tmp_path, fail, says)
        assert capfd.readouterr() == ("", "")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_write_that_the_system_refuses(tmp_path):
    """Always runs: the limit on a file's size makes real writes fail in the middle."""

    def fail(step: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        try:
            checkpoints.save(step, random_state(3), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    with Checkpoints(tmp_path) as checkpoints:
        assert_survives_a_failed_save(checkpoints, tmp_path, fail, r"could not be written .*File too large")


def test_a_full_disk_at_the_last_moment(tmp_path, monkeypatch):
    """Always runs: everything is written but the final rename fails as on a full disk."""
    import orbax.checkpoint as ocp

    def fail(step: int) -> None:
        def save(self: Any, *unused: Any, **kwargs: Any) -> None:
            (tmp_path / f"{step}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
            raise ValueError("wrapped") from OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", save)
            checkpoints.save(step, random_state(0.3), {})

    with Checkpoints(tmp_path) as checkpoints:
        assert_survives_a_failed_save(checkpoints, tmp_path, fail, r"^disk full: .* free \d+\.\d MB")


def test_interrupted_while_saving_orbax_stays_silent():
    """Its threads fail when the process ends, which is no news to somebody who has pressed Ctrl-C twice."""
    logger, hook = logging.getLogger("absl"), threading.excepthook
    level = logger.level
    try:
        with pytest.raises(KeyboardInterrupt), quiet_orbax():
            raise KeyboardInterrupt
        assert logger.level == logging.CRITICAL and threading.excepthook is not hook
    finally:
        logger.setLevel(level)
        threading.excepthook = hook
    with pytest.raises(OSError, match="full"), quiet_orbax():
        raise OSError("full")
    assert logger.level == level and threading.excepthook is hook


def test_killed_while_saving(tmp_path, program_env):
    """Looking for checkpoints is cheap: it does not import orbax."""
    program = f"""
        import os, signal, sys
        from fr_jax.training.checkpoints import Checkpoints
        checkpoints = Checkpoints({str(tmp_path)!r})
        assert checkpoints.steps() == [] and "orbax" not in sys.modules
        import orbax.checkpoint as ocp
        checkpoints.save(1, {{"x": 1}}, {{}})
        real = os.rename
        ocp.CheckpointManager.save = lambda *a, **k: (os.makedirs({str(tmp_path / "2.orbax-checkpoint-tmp/state")!r}),
                                                      os.kill(os.getpid(), signal.SIGKILL))
        checkpoints.save(2, {{"x": 2}}, {{}})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=program_env)
    assert killed.returncode == -signal.SIGKILL
    warnings: list[str] = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        assert checkpoints.restore({"x": 0}).step == 1
        assert len(warnings) == 1
        assert "step 2" in warnings[0]
        assert "never finished" in warnings[0]
        checkpoints.save(2, {"x": 2}, {})
        assert sorted(os.listdir(tmp_path)) == ["1", "2"]
