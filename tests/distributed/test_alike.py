"""Mini-batches that are not the same in all processes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.distributed import GroupError, _alike, _coordination, from_rows, launch, rows

KEY = jax.random.key(0)


@pytest.fixture
def pair(monkeypatch):
    """The comparisons of process 0 and 1 of a run, over a store that both have."""
    kept = {}

    class Store:
        def key_value_set(self, key, value):
            assert key not in kept
            kept[key] = value

        def key_value_try_get(self, key):
            if key not in kept:
                raise jax.errors.JaxRuntimeError("NOT_FOUND")
            return kept[key]

    monkeypatch.setattr(_coordination, "client", Store)
    return [_alike.Comparison((0, 1), index, "0-1/1") for index in range(2)]


def batch(seed, kind=np.asarray, **other):
    rng = np.random.default_rng(seed)
    inputs, targets = rng.standard_normal((6, 3)).astype(np.float32), rng.integers(0, 5, (6, 2))
    return fr.Batch(kind(inputs), {"a": kind(targets)}, kind(rng.permutation(6)))._replace(**other)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_the_same_mini_batches_are_nothing(pair, kind):
    for one in pair:
        one.init(KEY, batch(0, kind))
    for t in range(40):
        for one in pair:
            one.step(batch(t, kind))


def test_placed_arrays_are_not_looked_at(pair):
    """Each process has its own rows, or none."""
    for seed, one in enumerate(pair):
        one.init(KEY, batch(seed, lambda x: jax.device_put(x, jax.devices()[0])))
        one.step(batch(seed, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)))
    pair[0].step(batch(0))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("field", ["inputs", "targets", "index"])
@pytest.mark.parametrize("late", [0, 1, 5, 100, 1500])
def test_another_mini_batch_is_named_in_both(pair, field, kind, late):
    """Told at steps 0, 1, 2, 4, .., 1024, 2048, and looked at 16 steps later at most."""
    first, second = pair
    first.init(KEY, batch(0, kind)), second.init(KEY, batch(0, kind))
    told = next(t for t in (0, 1, 2, 4, 8, 128, 2048) if t >= late)
    said = rf"process 1 gave step\(\) number {told} \(from 0\) another {field} than process 0\. .*same seed.*rows"
    same, other = batch(0, kind), batch(0, kind, **{field: getattr(batch(1, kind), field)})
    for _ in range(late):
        first.step(same), second.step(same)

    def go_on(one, mini_batch):
        for _ in range(told - late + 17):
            one.step(mini_batch)

    second_told = [second.step(other) for _ in range(told - late + 1)]
    assert len(second_told) == told - late + 1
    with pytest.raises(GroupError, match=said) as caught:
        go_on(first, same)
    assert (caught.value.exit_code, caught.value.reported) == (2, False)
    with pytest.raises(GroupError, match=said) as caught:
        go_on(second, other)
    assert caught.value.reported


def test_another_key_is_named(pair):
    first, second = pair
    first.init(KEY, batch(0))
    second.init(jax.random.key(1), batch(0))
    with pytest.raises(GroupError, match=r"process 1 gave init\(\) another key than process 0"):
        first.step(batch(0))


def test_one_that_is_behind_is_not_waited_for(pair):
    for t in range(3000):
        pair[0].step(batch(t % 5))
    for t in range(3000):
        pair[1].step(batch(t % 5))


def test_checksums_are_small():
    big = np.arange(2**22, dtype=np.float32).reshape(2, -1)
    told = _alike._checksums(fr.Batch(big, big[:, ::7]))
    assert len(json.dumps(told)) < 100
    changed = big + (np.arange(2**22).reshape(2, -1) >= 2**21)
    assert told["inputs"] != _alike._checksums(fr.Batch(changed, big))["inputs"]


def test_an_algorithm_of_one_process_compares_nothing():
    assert _alike.comparison(fr.placement(2)) is None


@pytest.mark.parametrize("D", [1, 2])
def test_one_process_needs_all_rows(D):
    x = np.arange(12.0).reshape(6, 2)
    for sharding in fr.placement(2, data_parallel=D):
        np.testing.assert_array_equal(rows(sharding, 6), range(6))
        made = from_rows({"x": x}, sharding, 6)["x"]
        assert made.sharding == sharding and made.dtype == np.float32
        np.testing.assert_array_equal(made, x)
        with pytest.raises(ValueError, match="was given 5 rows; this process needs 6 of the 6"):
            from_rows(x[:5], sharding, 6)


SCRIPT = """
import json, time, jax, jax.numpy as jnp, numpy as np, optax
import fr_jax as fr
fr.distributed.initialize(heartbeat_seconds=2)
group, placement = fr.distributed.group(), fr.placement(2)
stages = fr.partition(fr.models.mlp(depth=2, width=4), (1,))
fit = fr.features_replay(stages, lambda y, z: jnp.mean((y - z) ** 2), optax.sgd(0.1), placement=placement)
whole = [np.random.default_rng(0).standard_normal((6, n)).astype(np.float32) for n in (3, 10)]

def own(x, sharding):
    mine = fr.distributed.rows(sharding, 6)
    return fr.distributed.from_rows(x[mine], sharding, 6), mine.tolist()

(inputs, first), (targets, last) = own(whole[0], placement[0]), own(whole[1], placement[1])
losses = []
for batch in (fr.Batch(*whole), fr.Batch(inputs, targets)):
    state = fit.init(jax.random.key(0), batch)
    for _ in range(4):
        state, info = fit.step(state, batch)
    losses.append(float(fr.distributed.read(info.loss)))
half, mine = own(whole[0], fr.placement(1, data_parallel=2)[0])
total = float(fr.distributed.read(jax.jit(jnp.sum)(half)))
print(json.dumps([first, last, mine, total - float(whole[0].sum()), losses]), flush=True)
rng = np.random.default_rng(group.index)
try:
    for t in range(9):
        whole = fr.Batch(*(rng.standard_normal((6, n)).astype(np.float32) for n in (3, 10)))
        state, info = fit.step(state, whole)
        group.exchange(None)
except fr.distributed.GroupError as error:
    print(json.dumps([t, str(error)]), flush=True)
if group.index == 1:
    time.sleep(1000)
begin = time.monotonic()
try:
    group.exchange(None)
except fr.distributed.GroupError as error:
    print(json.dumps([time.monotonic() - begin, str(error)]), flush=True)
"""


def answer(process):
    return json.loads(next(line for line in process.stdout if not line.startswith(b"[Gloo]")))


@pytest.mark.slow
def test_two_processes(tmp_path, program_env, monkeypatch):
    """A loader that reads its process's rows; different seeds; and one that is alive but stuck."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for name in ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, program_env[name])
    group = launch.start([str(script)], 2, pin=False)
    try:
        lines = [[answer(process) for _ in range(2)] for process in group]
        for k, (loaded, different) in enumerate(lines):
            *needed, half, missing, losses = loaded
            assert needed == [[list(range(6)), []], [[], list(range(6))]][k]
            assert half == [[0, 1, 2], [3, 4, 5]][k] and abs(missing) < 1e-5
            assert losses[0] == losses[1] == lines[0][0][-1][0]
            assert different[0] <= 9 and "process 1 gave step() number" in different[1]
            assert "another inputs than process 0" in different[1]
        seconds, message = answer(group[0])
        assert 19 < seconds < 60 and message.startswith("process 1, alive but busy or stuck, has not come to meeting")
    finally:
        for process in group:
            process.kill()
            process.communicate()
