"""``fr_jax.diagnostics.memory.step_memory`` beside sums done by hand, XLA's own numbers, and the papers' forms."""

import jax
import jax.numpy as jnp
import optax
import pytest

import fr_jax as fr
from fr_jax.diagnostics.memory.activations import StageActivations, closed_form, stage_activations
from fr_jax.diagnostics.memory.step_calls import step_calls
from fr_jax.diagnostics.memory.step_memory import KINDS, device_peaks, step_memory

K, B, WIDTH = 3, 8, 16
FLOAT = 4
BATCH = fr.Batch(jax.ShapeDtypeStruct((B, WIDTH), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32))
ANALYSES = {}  # of functions that several tests compile


def loss_fn(y, targets):
    return jnp.mean((y[:, 0] - targets) ** 2)


@pytest.fixture
def make():
    def make(method, shardings=None, **kwargs):
        stages = fr.partition(fr.models.mlp(num_classes=WIDTH, depth=K, width=WIDTH), range(1, K))
        shardings = fr.placement(K, jax.devices()[:K]) if shardings is None else shardings
        return method(stages, loss_fn, optax.adam(0.1), placement=shardings, donate=True, **kwargs)

    return make


def test_features_replay_by_hand(make):
    report = step_memory(make(fr.features_replay), BATCH, analyses=ANALYSES)
    weights, feature = (WIDTH * WIDTH + WIDTH) * FLOAT, B * WIDTH * FLOAT
    for k, stage in enumerate(report.stages, start=1):
        assert stage.parameters == weights
        assert stage.optimizer == 2 * weights + 4  # two moments and a count
        assert stage.history == ((K - k) * feature + feature if k < K else 0)
    assert [device.stages for device in report.devices] == [(1,), (2,), (3,)]
    assert [device.device for device in report.devices] == ["cpu:0", "cpu:1", "cpu:2"]
    for device, stage in zip(report.devices, report.stages, strict=True):
        assert device.between_steps["history"] == stage.history
        assert device.between_steps["residuals"] == 0
        assert device.peak["parameters"] == weights and list(device.peak) == list(KINDS)
        assert device.total >= sum(device.between_steps.values())
    assert [call.name for call in report.calls if call.name != "transfer"] == [
        *["play"] * (K - 1), "train", *["replay"] * (K - 1)
    ]  # fmt: skip
    assert report.total == sum(device.total for device in report.devices)
    assert report.total - report.activations == sum(3 * weights + 4 + d.peak["statistics"] for d in report.devices)


def test_fused_backpropagation_is_what_xla_says(make):
    """The whole step on one device, compiled as one function from outside: what it holds and what it adds."""
    algorithm = make(fr.backprop, fr.placement(K, jax.devices()[:1]))
    (device,) = step_memory(algorithm, BATCH, analyses=ANALYSES).devices
    batch = fr.Batch(jnp.zeros((B, WIDTH)), jnp.zeros(B, jnp.int32))
    state = algorithm.init(jax.random.key(0), batch)
    inside = (state.params, state.model_state, state.opt_state)

    def step(inside, streams, batch):
        names = ("params", "model_state", "opt_state")
        old = state._replace(streams=streams, **dict(zip(names, inside, strict=True)))
        new, info = algorithm.step(old, batch)
        return (new.params, new.model_state, new.opt_state), info.loss

    memory = jax.jit(step, donate_argnums=0).lower(inside, state.streams, batch).compile().memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((inside, state.streams, batch)))
    assert device.during == "train" and device.stages == (1, 2, 3)
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(inside))
    assert device.peak["temporaries"] == pytest.approx(memory.temp_size_in_bytes, rel=0.1)
    assert device.total - held == pytest.approx(memory.temp_size_in_bytes, rel=0.1)


def test_ddg_counts_every_vjp_that_is_kept(make):
    bp, ddg = (step_memory(make(method), BATCH, analyses=ANALYSES) for method in (fr.backprop, fr.ddg))
    assert [stage.history for stage in bp.stages] == [0] * K
    first, second, last = (stage.history for stage in ddg.stages)
    assert last == 0
    feature, weights = B * WIDTH * FLOAT, WIDTH * WIDTH * FLOAT
    # Stage 1 has two VJPs, stage 2 one with its weights; each has the stage's input and more, and there is a delta.
    assert first >= 2 * feature + feature and second >= feature + weights + feature
    assert ddg.total > bp.total


def test_data_parallel_counts_one_devices_share(make):
    alone = step_memory(make(fr.features_replay), BATCH, analyses=ANALYSES)
    shardings = fr.placement(K, jax.devices()[: 2 * K], data_parallel=2)
    split = step_memory(make(fr.features_replay, shardings), BATCH, analyses=ANALYSES)
    assert len(split.devices) == 2 * K
    for one, both in zip(alone.stages, split.stages, strict=True):
        assert (both.parameters, both.optimizer) == (one.parameters, one.optimizer)
        assert both.history == one.history // 2


@pytest.mark.parametrize(
    "method",
    [
        lambda *args, **kwargs: fr.gpipe(*args, microbatches=2, **kwargs),
        lambda *args, **kwargs: fr.dni(*args, fr.models.synthesizer(), optax.adam(0.1), **kwargs),
        lambda *args, **kwargs: fr.ddg(*args, weight_prediction=1.0, **kwargs),
    ],
    ids=["gpipe", "dni", "ddg with prediction"],
)
def test_every_method_can_be_examined(make, method):
    report = step_memory(make(method), BATCH, analyses=ANALYSES)
    assert len(report.devices) == K and all(device.total > 0 for device in report.devices)
    assert all(device.between_steps["residuals"] == 0 for device in report.devices)


def test_nothing_is_run_or_allocated(make):
    algorithm = make(fr.features_replay)
    enormous = fr.Batch(jax.ShapeDtypeStruct((10**9, WIDTH), jnp.float32), jax.ShapeDtypeStruct((10**9,), jnp.int32))
    before = {id(array) for array in jax.live_arrays()}
    report = step_memory(algorithm, enormous)
    assert report.stages[0].history == K * 10**9 * WIDTH * FLOAT
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in before) < 1000


def test_equal_functions_are_compiled_once(make):
    compiled, analyses = [], {}
    shardings = fr.placement(K, jax.devices()[:1])
    first = step_memory(make(fr.features_replay), BATCH, progress=compiled.append, analyses=analyses)
    assert compiled.count("replay") == 2 and compiled.count("train") == 1
    compiled.clear()
    again = step_memory(make(fr.features_replay), BATCH, progress=compiled.append, analyses=analyses)
    one = step_memory(make(fr.features_replay, shardings), BATCH, progress=compiled.append, analyses=analyses)
    assert compiled == [] and again == first
    assert max(device.total for device in first.devices) < one.total < first.total


def test_a_batch_that_does_not_fit_is_refused(make):
    algorithm = make(lambda *args, **kwargs: fr.gpipe(*args, microbatches=3, **kwargs))
    with pytest.raises(ValueError, match="cannot be split into microbatches = 3"):
        step_calls(algorithm, BATCH)


def test_device_peaks():
    class Device:
        platform, id = "gpu", 3

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert device_peaks([Device({"peak_bytes_in_use": 12}), Device(None)][:1]) == {"gpu:3": 12}
    assert device_peaks([Device(None)]) == {"gpu:3": None}
    assert all(peak is None or peak >= 0 for peak in device_peaks().values())


def test_closed_forms():
    stages = [StageActivations(inputs, residuals) for inputs, residuals in ((1, 40), (2, 50), (3, 60), (4, 70))]
    assert closed_form("bp", stages) == 220
    assert closed_form("ddg", stages) == 4 * 40 + 3 * 50 + 2 * 60 + 70
    assert closed_form("fr", stages) == 220 + 4 * 1 + 3 * 2 + 2 * 3
    assert closed_form("fr-one-device", stages) == 70 + 16
    assert closed_form("recompute", stages) == closed_form("checkpoint", stages) == 70 + 10
    assert closed_form("bp", stages, whole=440) == 440 and closed_form("fr", stages, whole=440) == 456
    assert closed_form("dni", stages) is None
    assert closed_form("gpipe", stages, microbatches=2) == 220
    assert closed_form("1f1b", stages, microbatches=2) == (2 * 40 + 2 * 50 + 2 * 60 + 70) / 2
    assert closed_form("ddg", stages, microbatches=2) == (4 * 40 + 3 * 50 + 2 * 60 + 70) / 2
    assert closed_form("fr", stages, microbatches=2) == (220 + 16) / 2


def test_activations_of_stages_are_shapes_alone():
    stages = fr.partition(fr.models.mlp(num_classes=WIDTH, depth=K, width=WIDTH), range(1, K))
    found = stage_activations(stages, jax.ShapeDtypeStruct((10**6, WIDTH), jnp.float32))
    assert [one.inputs for one in found] == [10**6 * WIDTH * FLOAT] * K
    assert all(one.residuals >= one.inputs for one in found)
