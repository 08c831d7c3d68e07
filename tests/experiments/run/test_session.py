import fractions

import jax
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.data import image_sets as data
from fr_jax.experiments._cli.checks import resolve
from fr_jax.experiments._cli.devices import request_devices
from fr_jax.experiments._cli.settings import Resolved, TrainSettings
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._run import session as session_module
from fr_jax.experiments._run.session import (
    build,
    choose_devices,
    learning_rate_schedule,
    make_optimizer,
    stage_work,
)
from fr_jax.partitioning.costs import LayerCost


def resolved(**settings: object) -> Resolved:
    return resolve(TrainSettings(**settings), "digits", 1433)


@pytest.mark.parametrize(
    ("milestones", "steps_per_epoch"),
    [
        (("2", "4"), 5),
        (("0.7", "0.3"), 10),  # 0.7 * 10 is 7.000000000000001 in floating point
        (("0.5", "0.75"), 7),
        (("1", "1"), 3),
        (("0",), 4),
        ((), 4),
    ],
)
def test_learning_rate_schedule_is_the_naive_one(milestones, steps_per_epoch):
    settings = resolved(learning_rate=0.2, milestones=tuple(map(float, milestones)))
    schedule = learning_rate_schedule(settings, steps_per_epoch)
    for step in range(6 * steps_per_epoch):
        done = fractions.Fraction(step, steps_per_epoch)
        passed = sum(done >= fractions.Fraction(milestone) for milestone in milestones)
        np.testing.assert_allclose(schedule(step), 0.2 * 0.1**passed, rtol=1e-5)


def test_with_accumulation_the_schedule_counts_updates():
    schedule = learning_rate_schedule(resolved(learning_rate=0.2, milestones=(2.0,), accumulate=4), 10)
    np.testing.assert_allclose([schedule(4), schedule(5)], [0.2, 0.02], rtol=1e-5)  # 20 mini-batches are 5 updates


@pytest.mark.parametrize("steps", [3, 4, 100, 333])
def test_default_milestones_are_half_and_three_quarters_of_the_steps(steps):
    settings = resolve(TrainSettings(steps=steps, learning_rate=1.0), "cifar10", 50_000)
    schedule = learning_rate_schedule(settings, 390)
    rates = np.array([schedule(step) for step in range(steps)])
    naive = [0.1 ** ((step >= steps / 2) + (step >= steps * 3 / 4)) for step in range(steps)]
    np.testing.assert_allclose(rates, naive, rtol=1e-5)


def torch_sgd(w, gradients, rates, momentum, nesterov, weight_decay):
    """torch.optim.SGD, line by line."""
    buffer = None
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient + weight_decay * w
        if momentum:
            buffer = gradient if buffer is None else momentum * buffer + gradient
            gradient = gradient + momentum * buffer if nesterov else buffer
        w = w - rate * gradient
    return w


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_optimizer_is_that_of_torch(momentum, nesterov, weight_decay):
    settings = resolved(
        learning_rate=0.1, milestones=(1.0,), momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )
    optimizer = make_optimizer(settings, steps_per_epoch=3)
    gradients = [0.5, -1.0, 2.0, 0.25, 1.5]
    w, state = jax.numpy.float32(1.5), None
    state = optimizer.init(w)
    for gradient in gradients:
        updates, state = optimizer.update(jax.numpy.float32(gradient), state, w)
        w = optax.apply_updates(w, updates)
    expected = torch_sgd(1.5, gradients, [0.1] * 3 + [0.01] * 2, momentum, nesterov, weight_decay)
    np.testing.assert_allclose(w, expected, rtol=1e-5)


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
