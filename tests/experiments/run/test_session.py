import jax
import pytest

import fr_jax as fr
from fr_jax.data import image_sets as data
from fr_jax.experiments._cli.checks import resolve
from fr_jax.experiments._cli.devices import request_devices
from fr_jax.experiments._cli.settings import Resolved, TrainSettings
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._run import session as session_module
from fr_jax.experiments._run.session import build, choose_devices, stage_work
from fr_jax.partitioning.costs import LayerCost


def resolved(**settings: object) -> Resolved:
    return resolve(TrainSettings(**settings), "digits", 1433)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def test_balance_chooses_the_cuts(digits, monkeypatch):
    uniform = build(resolved(K=3, model="mlp", balance="uniform"), digits)
    assert uniform.cuts == (2, 4)
    by_flops = build(resolved(K=3, model="mlp"), digits)
    assert max(stage_work(by_flops)) <= max(stage_work(uniform))
    explicit = build(resolved(K=3, model="mlp", cuts=(1, 5)), digits)
    assert explicit.cuts == (1, 5)
    assert build(resolved(K=3, model="mlp"), digits, saved_cuts=(3, 4)).cuts == (3, 4)
    measured, examples = [LayerCost(1.0, 2.0, 3.0)] * 6, []

    def layer_times(layers, example, repeats):
        assert len(layers) == 6
        examples.append(example.shape[0])
        return measured

    monkeypatch.setattr(fr, "layer_times", layer_times)
    # Of equal layers: the first needs no input gradient (1 less), the last stage does not play (3 a layer, not 4).
    assert build(resolved(K=3, model="mlp", balance="time"), digits).cuts == (2, 4)
    measured[2:4] = [LayerCost(10.0, 20.0, 30.0)] * 2
    assert build(resolved(K=3, model="mlp", balance="time"), digits).cuts == (2, 3)
    build(resolved(K=3, model="mlp", balance="time", data_parallel=2), digits)
    assert examples == [64, 64, 32]


def test_stage_work_counts_what_the_method_does(digits):
    def work(**settings):
        session = build(resolved(model="mlp", **settings), digits)
        return stage_work(session), session.costs.layers

    sums = lambda layers, field: sum(getattr(layer, field) for layer in layers)
    back, layers = work(K=2, cuts=(2,), method="bp")
    first = layers[0].weights_gradient + layers[1].both_gradients
    last = sums(layers[2:], "both_gradients")
    assert back == pytest.approx([first, last])
    assert work(K=2, cuts=(2,), method="ddg")[0] == back == work(K=2, cuts=(2,), method="gpipe")[0]
    play = sums(layers[:2], "forward")
    assert work(K=2, cuts=(2,))[0] == pytest.approx([first + play, last])
    assert work(K=1)[0] == pytest.approx([first + last])
    h_step = sums(layers[2:], "input_gradient")
    blocks = work(K=2, cuts=(2,), method="blockprop", h_steps=3)[0]
    assert blocks == pytest.approx([first + play, last + 3 * h_step])
    # A synthesizer of three dense layers of the width of the feature, 256, without input gradient of its first.
    synthesizer = work(K=2, cuts=(2,), method="dni")[0][0] - first
    assert synthesizer == pytest.approx((2 + 3 + 3) * 2 * 64 * 256**2, rel=0.05)


def test_devices_go_round_robin(digits):
    assert len(choose_devices(TrainSettings(K=2))) == 2
    assert len(choose_devices(TrainSettings(K=2, data_parallel=2))) == 4
    assert len(choose_devices(TrainSettings(K=2, devices=1))) == 1
    assert len(choose_devices(TrainSettings(K=100))) == len(jax.devices())
    one = build(resolved(K=2, model="mlp", devices=1), digits)
    assert one.placement[0] == one.placement[1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (TrainSettings(model="mlp", K=7), "--K 7 stages were asked of mlp, which has 6 layers; K can be 1 to 6"),
        (TrainSettings(model="mlp", K=7, devices=9999), "--K 7 stages"),
        (TrainSettings(model="mlp", devices=9), "--devices 9 were asked for; JAX sees 8 .cpu.. Use at most 8"),
        (TrainSettings(model="mlp", K=3, cuts=(4, 2)), "cuts must increase strictly within 1 .. 5"),
        (TrainSettings(model="mlp", K=3, cuts=(2, 2)), "cuts must increase strictly"),
        (TrainSettings(model="mlp", K=3, cuts=(0, 2)), "leave stage 1 of 3 without layers"),
        (TrainSettings(model="mlp", K=3, cuts=(2, 6)), "leave stage 3 of 3 without layers"),
        (TrainSettings(model="mlp", batch_size=5000), "at most the 1,433 training examples. Try 1433"),
        (TrainSettings(model="mlp", K=2, data_parallel=3), "multiple of 3"),
        (TrainSettings(model="mlp", K=2, data_parallel=9), "it can be 1 to 8"),
    ],
)
def test_build_says_what_fits(digits, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        build(resolve(settings, "digits", 1433), digits)


def test_requesting_devices_after_the_backend_is_up_is_harmless():
    before = len(jax.devices())
    request_devices(before + 1)
    assert len(jax.devices()) == before


def test_too_large_a_K_is_named_before_any_device_is_made(digits, monkeypatch):
    monkeypatch.setattr(session_module, "choose_devices", lambda settings: pytest.fail("devices were made"))
    with pytest.raises(SettingsError, match="--K 1000000"):
        build(resolved(K=1_000_000), digits)
