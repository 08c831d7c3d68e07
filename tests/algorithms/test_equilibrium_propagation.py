import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms import equilibrium_propagation as eqprop

close = {"rtol": 1e-10, "atol": 1e-12}
SIZES = (3, 5, 4, 2)


def own(**changes):
    settings = {"beta": 0.1, "centred": True, "free_steps": 400, "nudged_steps": 400, "step_size": 0.5}
    return eqprop.Relaxation(**settings | changes)


def inner(seed=0, sizes=SIZES, B=6):
    """Weights for which no unit comes to rest on a bound, inputs and targets."""
    rng = np.random.default_rng(seed)
    params = tuple(
        {"kernel": jnp.asarray(rng.uniform(-0.15, 0.15, (n, m))), "bias": jnp.asarray(rng.uniform(0.35, 0.55, m))}
        for n, m in zip(sizes, sizes[1:], strict=False)
    )
    return params, jnp.asarray(rng.uniform(-1, 1, (B, sizes[0]))), jnp.asarray(rng.uniform(0, 1, (B, sizes[-1])))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def naive_relax(w, s, x, y, beta, steps, epsilon):
    for _ in range(steps):
        layers, forces = [x, *s], []
        for i, unit in enumerate(s):
            force = layers[i] @ w[i]["kernel"] + w[i]["bias"] - unit
            force = force + (s[i + 1] @ w[i + 1]["kernel"].T if i + 1 < len(s) else beta * (y - unit))
            forces.append(force)
        s = [np.clip(unit + epsilon * force, 0, 1) for unit, force in zip(s, forces, strict=True)]
    return s


def hebb(w, s, x):
    """DE/dW: minus the products of the units that a weight joins, the mean over the batch."""
    layers = [x, *s]
    return [{"kernel": -layers[i].T @ layers[i + 1] / len(x), "bias": -layers[i + 1].mean(0)} for i in range(len(w))]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("centred", "optimizer", "step_size"), [(True, "nesterov", 0.5), (False, "adam", 1.0)], ids=["centred", "one-sided"]
)
def test_trajectory_equals_the_equations(naive, make_batches, run, centred, optimizer, step_size):
    ours, theirs = naive.OPTIMIZERS[optimizer]
    fit = fr.equilibrium_propagation(
        SIZES,
        ours(),
        beta=0.3,
        centred=centred,
        free_steps=7,
        nudged_steps=4,
        step_size=step_size,
        return_grads=True,
    )
    batches = make_batches(5)
    states, infos = run(fit, batches)
    w, update = jax.tree.map(np.asarray, states[0].params[0]), theirs()
    for batch, state, info in zip(batches, states[1:], infos, strict=True):
        x, y = np.asarray(batch.inputs), np.asarray(batch.targets)
        s = naive_relax(w, [np.zeros((len(x), n)) for n in SIZES[1:]], x, y, 0, 7, step_size)
        plus, minus = (naive_relax(w, s, x, y, beta, 4, step_size) for beta in (0.3, -0.3))
        first, second = hebb(w, plus, x), hebb(w, minus if centred else s, x)
        grads = tuple(jax.tree.map(lambda a, b: (a - b) / (0.6 if centred else 0.3), first, second))
        chex.assert_trees_all_close(info.grads, (grads,), **close)
        np.testing.assert_allclose(info.loss, naive.squared_error(s[-1], y) / 2, **close)
        after = naive_relax(w, s, x, y, 0, 1, step_size)
        change = max(abs(a - b).max() for a, b in zip(after, s, strict=True))
        np.testing.assert_allclose(info.metrics["free_change"], change, **close)
        w = update(w, grads)
        chex.assert_trees_all_close(state.params, (w,), **close)
    np.testing.assert_allclose(
        fit.predict(states[-1], batches[0].inputs),
        naive_relax(w, [np.zeros((6, n)) for n in SIZES[1:]], np.asarray(batches[0].inputs), 0, 0, 7, step_size)[-1],
        **close,
    )


@pytest.mark.usefixtures("x64")
def test_units_move_down_the_slope_of_the_energy_and_the_cost():
    params, x, y = inner()
    rng = np.random.default_rng(1)
    s = tuple(jnp.asarray(rng.uniform(0.3, 0.7, (6, n))) for n in SIZES[1:])
    F = lambda s: len(x) * (eqprop.energy(params, s, x) + 0.4 * jnp.sum((s[-1] - y) ** 2) / 2 / len(x))
    moved = eqprop.relax(own(step_size=0.01), params, s, x, y, 0.4, 1)
    chex.assert_trees_all_close(moved, jax.tree.map(lambda s, slope: s - 0.01 * slope, s, jax.grad(F)(s)), **close)
    rest = eqprop.relax(own(), params, s, x, y, 0.4, 400)
    np.testing.assert_allclose(flat(jax.grad(F)(rest)), 0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("centred", "order"), [(False, 1), (True, 2)])
def test_the_estimate_is_the_gradient_through_the_converged_dynamics(centred, order):
    """But for an error of the order of beta, or beta^2; back-propagation goes through 400 steps of the free phase."""
    params, x, y = inner()

    def cost(params):
        return jnp.sum((eqprop.free_phase(own(), params, x)[-1] - y) ** 2) / 2 / len(x)

    s = eqprop.free_phase(own(), params, x)
    assert all(unit.min() > 0.02 and unit.max() < 0.98 for unit in s)
    exact, betas, errors = flat(jax.grad(cost)(params)), np.array([0.2, 0.1, 0.05]), []
    for beta in betas:
        estimate = flat(eqprop.gradients(own(beta=beta, centred=centred), params, s, x, y))
        errors.append(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))
    assert abs(np.polyfit(np.log(betas), np.log(errors), 1)[0] - order) < 0.15, errors
    assert errors[-1] < (0.01 if centred else 0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("centred", "factor"), [(False, 1.1), (True, 1 - 0.1**2)])
def test_without_a_hidden_layer_it_is_backprop_but_for_a_factor(centred, factor):
    params, x, y = inner(sizes=(3, 2))
    cost = lambda params: jnp.sum((x @ params[0]["kernel"] + params[0]["bias"][None] - y) ** 2) / 2 / len(x)
    settings = own(centred=centred)
    estimate = eqprop.gradients(settings, params, eqprop.free_phase(settings, params, x), x, y)
    chex.assert_trees_all_close(estimate, jax.tree.map(lambda g: g / factor, jax.grad(cost)(params)), rtol=1e-8)


def test_it_learns_labels(run):
    """Labels stand for 0 and 1; images are flattened."""
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((32, 4, 4, 1)).astype(np.float32), rng.integers(0, 3, 32).astype(np.int32)
    accuracy = lambda y, z: {"accuracy": (y.argmax(-1) == z).mean()}
    fit = fr.equilibrium_propagation((16, 32, 3), optax.adam(0.02), metrics_fn=accuracy)
    states, infos = run(fit, [fr.Batch(images, labels)] * 60)
    assert infos[-1].metrics["accuracy"] > 0.8 > infos[0].metrics["accuracy"]
    assert infos[-1].loss < 0.5 * infos[0].loss and infos[-1].metrics["free_change"] < 1e-3
    fit = fr.equilibrium_propagation((16, 32, 3), optax.adam(0.02))
    one_hot, _ = run(fit, [fr.Batch(images, np.eye(3, dtype=np.float32)[labels])])
    chex.assert_trees_all_close(one_hot[1].params, states[1].params, rtol=1e-6)
    scaled, _ = run(
        fr.equilibrium_propagation((16, 32, 3), optax.adam(0.02), input_scale=0.5), [fr.Batch(2 * images, labels)]
    )
    chex.assert_trees_all_close(scaled[1].params, states[1].params, rtol=1e-6)
    (params, _) = fr.layer_params(states[-1])
    again = fit.init(jax.random.key(5), fr.Batch(images, labels), params)
    chex.assert_trees_all_equal(again.params, states[-1].params)


@pytest.mark.usefixtures("x64")
def test_devices_and_donation_change_no_number_and_nothing_recompiles(make_batches, run, compilations):
    batches = make_batches(4)
    make = lambda **options: fr.equilibrium_propagation(SIZES, optax.sgd(0.1, momentum=0.9), **options)
    plain, _ = run(make(), batches)
    split = make(placement=fr.placement(1, jax.devices()[:2], data_parallel=2), donate=True)
    state = split.init(jax.random.key(1), batches[0])
    for t, batch in enumerate(batches):
        old, (state, _) = state, split.step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
        chex.assert_trees_all_close(state.params, plain[t + 1].params, **close)
        if t == 1:
            compilations.clear()
    assert not [name for name in compilations if "train" in name]
    np.testing.assert_allclose(
        split.predict(state, batches[0].inputs[:3]), make().predict(plain[-1], batches[0].inputs[:3]), **close
    )


def test_a_state_is_still_good_after_its_step(make_batches):
    fit, (batch,) = fr.equilibrium_propagation(SIZES, optax.adam(0.01)), make_batches(1)
    state = fit.init(jax.random.key(1), batch)
    first, second = (fit.step(state, batch) for _ in range(2))
    without_keys = lambda state: state._replace(streams=())
    chex.assert_trees_all_equal((without_keys(first[0]), first[1]), (without_keys(second[0]), second[1]))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"layer_sizes": (784,)},
            r"layer_sizes = \(784,\) was given; equilibrium propagation trains dense networks only",
        ),
        ({"layer_sizes": [fr.from_linen(nn.Conv(4, (3, 3)))] * 2}, "layer_sizes = .* trains dense networks only"),
        ({"layer_sizes": fr.from_linen(nn.Dense(3))}, "layer_sizes = Stage.* give two or more whole numbers"),
        ({"layer_sizes": (3, 0)}, r"layer_sizes = \(3, 0\) was given"),
        ({"beta": 0.0}, "beta = 0.0 was given; it must be a finite number above 0"),
        ({"beta": float("inf")}, "beta = inf was given"),
        ({"step_size": 1.5}, "step_size = 1.5 was given; it must be a number above 0, at most 1"),
        ({"input_scale": 0}, "input_scale = 0 was given; it must be a finite number above 0"),
        ({"free_steps": 0}, "free_steps = 0 was given; it must be a whole number, at least 1"),
        ({"nudged_steps": 2.0}, "nudged_steps = 2.0 was given"),
        ({"optimizer": [optax.sgd(0.1)] * 2}, "2 optimizers were given for K = 1 stages"),
    ],
)
def test_wrong_arguments_are_refused(arguments, complaint):
    given = {"layer_sizes": SIZES, "optimizer": optax.sgd(0.1)} | arguments
    with pytest.raises(ValueError, match=complaint):
        fr.equilibrium_propagation(**given)


def test_batches_that_do_not_fit_are_refused(make_batches):
    (batch,) = make_batches(1)
    with pytest.raises(ValueError, match=r"inputs of shape \(6, 3\) have 3 values .* layer_sizes begin with 4"):
        fr.equilibrium_propagation((4, 2), optax.sgd(0.1)).init(jax.random.key(0), batch)
    fit = fr.equilibrium_propagation((3, 4), optax.sgd(0.1))
    state = fit.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match=r"targets float32 of shape \(6, 2\) were given for 4 outputs"):
        fit.step(state, batch)
    with pytest.raises(ValueError, match="this state was made by init"):
        fit.step(state, batch._replace(inputs=np.ones((6, 5), np.float32)))
