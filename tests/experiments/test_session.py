import fractions

import jax
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.experiments import session as session_module
from fr_jax.experiments.checks import resolve
from fr_jax.experiments.session import (
    build,
    choose_devices,
    learning_rate_schedule,
    make_optimizer,
    request_devices,
    stage_work,
)
from fr_jax.experiments.settings import SettingsError, TrainSettings
from fr_jax.training import data


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
    settings = TrainSettings(learning_rate=0.2, milestones=tuple(map(float, milestones)))
    schedule = learning_rate_schedule(settings, steps_per_epoch)
    for step in range(6 * steps_per_epoch):
        done = fractions.Fraction(step, steps_per_epoch)
        passed = sum(done >= fractions.Fraction(milestone) for milestone in milestones)
        np.testing.assert_allclose(schedule(step), 0.2 * 0.1**passed, rtol=1e-5)


def test_with_accumulation_the_schedule_counts_updates():
    schedule = learning_rate_schedule(TrainSettings(learning_rate=0.2, milestones=(2.0,), accumulate=4), 10)
    np.testing.assert_allclose([schedule(4), schedule(5)], [0.2, 0.02], rtol=1e-5)  # 20 mini-batches are 5 updates


@pytest.mark.parametrize("steps", [3, 4, 100, 333])
def test_default_milestones_are_half_and_three_quarters_of_the_steps(steps):
    settings = resolve(TrainSettings(steps=steps, learning_rate=1.0), "cifar10", 128, 390)
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
    settings = TrainSettings(
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
    layers = 6
    uniform = build(TrainSettings(K=3, model="mlp", balance="uniform"), digits)
    assert uniform.cuts == (2, 4)
    by_flops = build(TrainSettings(K=3, model="mlp"), digits)
    assert by_flops.cuts == fr.balance(by_flops.costs, 3, last_stage_weight=3 / 4)
    explicit = build(TrainSettings(K=3, model="mlp", cuts=(1, 5)), digits)
    assert explicit.cuts == (1, 5)
    assert build(TrainSettings(K=3, model="mlp"), digits, saved_cuts=(3, 4)).cuts == (3, 4)
    measured = [1.0, 1.0, 1.0, 10.0, 1.0, 1.0]

    def layer_costs(given, example, measure="flops"):
        assert len(given) == layers
        return measured if measure == "time" else by_flops.costs

    monkeypatch.setattr(session_module.fr, "layer_costs", layer_costs)
    expected = fr.balance(measured, 3, last_stage_weight=3 / 4)
    assert expected != by_flops.cuts
    assert build(TrainSettings(K=3, model="mlp", balance="time"), digits).cuts == expected


def test_stage_work_counts_what_the_method_does(digits):
    replay = build(TrainSettings(K=2, model="mlp", cuts=(2,)), digits)
    assert stage_work(replay) == pytest.approx([sum(replay.costs[:2]) * 4 / 3, sum(replay.costs[2:])])
    back = build(TrainSettings(K=2, model="mlp", cuts=(2,), method="bp"), digits)
    assert stage_work(back) == pytest.approx([sum(back.costs[:2]), sum(back.costs[2:])])
    alone = build(TrainSettings(K=1, model="mlp"), digits)
    assert stage_work(alone) == pytest.approx([sum(alone.costs)])


def test_devices_go_round_robin(digits):
    assert len(choose_devices(TrainSettings(K=2))) == 2
    assert len(choose_devices(TrainSettings(K=2, data_parallel=2))) == 4
    assert len(choose_devices(TrainSettings(K=2, devices=1))) == 1
    assert len(choose_devices(TrainSettings(K=100))) == len(jax.devices())
    one = build(TrainSettings(K=2, model="mlp", devices=1), digits)
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
        build(settings, digits)


def test_requesting_devices_after_the_backend_is_up_is_harmless():
    before = len(jax.devices())
    request_devices(before + 1)
    assert len(jax.devices()) == before


def test_too_large_a_K_is_named_before_any_device_is_made(digits, monkeypatch):
    monkeypatch.setattr(session_module, "choose_devices", lambda settings: pytest.fail("devices were made"))
    with pytest.raises(SettingsError, match="--K 1000000"):
        build(TrainSettings(K=1_000_000), digits)
