import dataclasses
import fractions

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.experiments._cli.checks import differences, resolve
from fr_jax.experiments._cli.settings import Resolved, TrainSettings, as_json
from fr_jax.experiments._run.optimizers import learning_rate_schedule, make_optimizer, make_optimizers


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
    settings = resolved(learning_rate=0.2, schedule="cosine", accumulate=4, steps=40, warmup=8)
    rates = [learning_rate_schedule(settings, 10)(count) for count in range(11)]
    np.testing.assert_allclose(rates[:3], [0.1, 0.2, 0.2], rtol=1e-5)  # 8 mini-batches are 2 updates
    np.testing.assert_allclose(rates[6::4], [0.1, 0.0], atol=1e-7)


@pytest.mark.parametrize("steps", [3, 4, 100, 333])
def test_default_milestones_are_half_and_three_quarters_of_the_steps(steps):
    settings = resolve(TrainSettings(steps=steps, learning_rate=1.0), "cifar10", 50_000)
    schedule = learning_rate_schedule(settings, 390)
    rates = np.array([schedule(step) for step in range(steps)])
    naive = [0.1 ** ((step >= steps / 2) + (step >= steps * 3 / 4)) for step in range(steps)]
    np.testing.assert_allclose(rates, naive, rtol=1e-5)


def naive_rate(schedule: str, step: int, warmup: int) -> float:
    after = {
        "constant": 1.0,
        "steps": 0.1 ** ((step >= 5) + (step >= 10)),
        "cosine": (1 + np.cos(np.pi * max(step - warmup, 0) / (20 - warmup))) / 2,
    }
    return 0.3 * after[schedule] * min(1.0, (step + 1) / warmup if warmup else 1.0)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["steps", "cosine", "constant"])
def test_schedules_and_warmup_are_the_naive_ones(schedule, warmup):
    own = {"milestones": (1.0, 2.0)} if schedule == "steps" else {}
    settings = resolved(learning_rate=0.3, schedule=schedule, warmup=warmup, steps=20, **own)
    made = learning_rate_schedule(settings, 5)
    naive = [naive_rate(schedule, step, warmup) for step in range(20)]
    np.testing.assert_allclose([made(step) for step in range(20)], naive, rtol=1e-5)


def run(settings: Resolved, params, gradients):
    """The parameters after each update."""
    optimizer = make_optimizer(settings, steps_per_epoch=3)
    state, path = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def torch_sgd(w, gradients, rates, momentum, nesterov, weight_decay):
    """torch.optim.SGD, line by line."""
    buffer = None
    for gradient, rate in zip(gradients, rates, strict=True):
        d = gradient + weight_decay * w
        if momentum:
            buffer = d if buffer is None else momentum * buffer + d
            d = d + momentum * buffer if nesterov else buffer
        w = w - rate * d
    return w


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"), [(0.9, False, 5e-4), (0.9, True, 5e-4), (0.0, False, 0.0)]
)
def test_sgd_is_torchs(momentum, nesterov, weight_decay):
    settings = resolved(
        learning_rate=0.1, milestones=(1.0,), momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )
    gradients = [0.5, -1.0, 2.0, 0.25, 1.5]
    *_, w = run(settings, jnp.float32(1.5), map(jnp.float32, gradients))
    expected = torch_sgd(1.5, gradients, [0.1] * 3 + [0.01] * 2, momentum, nesterov, weight_decay)
    np.testing.assert_allclose(w, expected, rtol=1e-5)


def test_adamw_decouples_weight_decay():
    settings = resolved(optimizer="adamw", learning_rate=0.01, schedule="constant", weight_decay=0.1)
    gradients, w, m, v = [0.5, -1.0, 2.0], 1.5, 0.0, 0.0
    *_, made = run(settings, jnp.float32(w), map(jnp.float32, gradients))
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= 0.01 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * w)
    np.testing.assert_allclose(made, w, rtol=1e-5)


def test_clipping_is_by_the_norm_of_the_stage():
    settings = resolved(learning_rate=1.0, schedule="constant", momentum=0.0, weight_decay=0.0, clip=1.0)
    params, gradient = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    (clipped,) = run(settings, params, [gradient])
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [-0.6, -0.8], rtol=1e-6)
    (small,) = run(settings, params, [jax.tree.map(lambda g: g / 10, gradient)])
    np.testing.assert_allclose([small["a"][0], small["b"][0]], [-0.3, -0.4], rtol=1e-6)


def test_muon_orthogonalizes_kernels_and_trains_the_rest_by_adam():
    settings = resolved(optimizer="muon", learning_rate=0.01, schedule="constant", weight_decay=0.0)
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 8), "dense": (6, 4), "bias": (4,), "scale": ()}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    gradient = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    (moved,) = run(settings, (params,), [(gradient,)])
    step = {name: np.asarray(moved[0][name] - params[name]) for name in shapes}
    for name, scale in {"conv": np.sqrt(18), "dense": np.sqrt(6)}.items():
        singular = np.linalg.svd(step[name].reshape(-1, shapes[name][-1]), compute_uv=False) / (0.01 * 0.2 * scale)
        assert singular.min() > 0.5 and singular.max() < 1.5  # Newton-Schulz stops near 1
    sizes = [-step[name] / np.sign(gradient[name]) for name in ("bias", "scale")]  # Adam's first update is a sign
    np.testing.assert_allclose(np.concatenate([size.ravel() for size in sizes]), sizes[1], rtol=1e-3)
    assert sizes[1] > 0.01


def same_path(made: optax.GradientTransformation, expected: optax.GradientTransformation) -> None:
    params, states = [jnp.array([1.5, -2.0])] * 2, [one.init(jnp.zeros(2)) for one in (made, expected)]
    for gradient in (0.5, -1.0, 2.0):
        for i, one in enumerate((made, expected)):
            update, states[i] = one.update(jnp.array([gradient, 1.0]), states[i], params[i])
            params[i] = optax.apply_updates(params[i], update)
    np.testing.assert_array_equal(*params)


CONSTANT = {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ({"optimizer": "nadam"}, lambda K: fr.staleness.nadam(0.1, K)),
        ({"optimizer": "nadam", "late_b1": 0.9, "method": "ddg"}, lambda K: fr.staleness.nadam(0.1, K, late_b1=0.9)),
        ({"optimizer": "nadam", "microbatches": 2, "accumulate": 2}, lambda K: fr.staleness.nadam(0.1, K, 4)),
        ({"spike_compensation": True}, lambda K: fr.staleness.spike_compensation(0.1, 0.9, K)),
        ({"spike_compensation": True, "microbatches": 2}, lambda K: fr.staleness.spike_compensation(0.1, 0.9, K, 2)),
    ],
)
def test_optimizers_that_know_how_late_a_stage_is(given, recipe):
    settings = resolved(K=3, **CONSTANT, **given)
    made = make_optimizers(settings, steps_per_epoch=3)
    assert len(made) == 3
    for one, expected in zip(made, recipe(3), strict=True):
        same_path(one, expected)
    own = make_optimizers(dataclasses.replace(settings, stage_learning_rates=(0.1, 0.2, 0.1)), steps_per_epoch=3)
    same_path(own[0], recipe(3)[0])
    with pytest.raises(AssertionError):
        same_path(own[1], recipe(3)[1])


@pytest.mark.parametrize("method", ["bp", "gpipe", "2bw"])
def test_where_no_stage_is_later_than_another_all_have_one_nadam(method):
    settings = resolved(method=method, K=3, optimizer="nadam", **CONSTANT)
    same_path(make_optimizers(settings, steps_per_epoch=3), fr.staleness.nadam(0.1, 1)[0])
    each = dataclasses.replace(settings, stage_learning_rates=(0.1, 0.1, 0.1))
    same_path(make_optimizers(each, steps_per_epoch=3)[1], fr.staleness.nadam(0.1, 1)[0])


def test_the_schedule_counts_mini_batches_whatever_the_micro_batches():
    plain, split = (learning_rate_schedule(resolved(milestones=(2.0,), microbatches=M), 10) for M in (1, 4))
    assert [float(split(step)) for step in range(25)] == [float(plain(step)) for step in range(25)]


def test_the_length_of_a_run_is_mathematics_with_a_cosine_only():
    now = as_json(resolved(steps=60, milestones=(1.0,)))
    assert differences(now | {"steps": 50}, now) == []
    now = as_json(resolved(steps=60, schedule="cosine"))
    assert now["milestones"] == []
    (text,) = differences(now | {"steps": 50}, now)
    assert text.startswith("--steps is 60 and was 50 (the length of the run sets the learning rates")


def test_a_run_of_fr_jax_0_1_has_the_defaults():
    now = as_json(resolved(steps=60))
    old = {name: value for name, value in now.items() if name not in ("optimizer", "schedule", "warmup", "clip")}
    assert differences(old, now) == []
    assert differences(old, now | {"optimizer": "adamw"}) == ["--optimizer is adamw and was sgd"]
