import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

N, B = 11, 4  # examples in the data set of `visits`, and in a mini-batch
close = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def modules(naive):
    """``K -> modules``; dropout and running statistics are among them."""

    def modules(K):
        stages = (naive.dense(4), naive.dropout(0.2)), (naive.dense(3), naive.batch_norm()), (naive.dense(5),)
        return [*stages[: K - 1], (naive.dense(2),)]

    return modules


@pytest.fixture
def visits():
    """``epochs -> batches``: each epoch in an order of its own, and without its last N % B examples."""
    rng = np.random.default_rng(5)
    data = rng.uniform(-1, 1, (N, 3)), rng.uniform(-1, 1, (N, 2))

    def visits(epochs):
        orders = np.concatenate([rng.permutation(N)[: N - N % B].reshape(-1, B) for _ in range(epochs)])
        return [fr.Batch(*(jnp.asarray(d[i]) for d in data), jnp.asarray(i, jnp.int32)) for i in orders]

    return visits


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def naive_mac(naive, modules, updates, start, batches, *, mu, growth, patience, w_steps, z_steps, eta, cached):
    """The equations; yields weights, statistics, kept coordinates, gradients, terms of Q before the W-step, and mu."""
    K = len(modules)
    w, w_state = jax.tree.map(np.asarray, (list(start.params), list(start.model_state)))
    keys, kept, values, before = naive.layer_keys(modules, start), {}, [], np.inf
    for t, batch in enumerate(batches):
        x, y = np.asarray(batch.inputs), np.asarray(batch.targets)
        index = np.asarray(batch.index).tolist()
        run = lambda k, h, draw: naive.forward(modules[k], w[k], w_state[k], h, keys(k, draw))
        z = [x]
        for k in range(1, K):
            p = run(k - 1, z[k - 1], t * w_steps)[0]
            z.append(np.stack([kept.get((i, k), p[n]) if cached else p[n] for n, i in enumerate(index)]))
        for _ in range(z_steps):
            outs = [run(k, z[k], t * w_steps) for k in range(K)]
            slopes = [None]
            for k in range(1, K):
                out, _, pull = outs[k]
                slopes.append(pull(2 * (out - y) if k == K - 1 else mu * (out - z[k + 1]))[1])
            z = [x] + [z[k] - eta / mu * (mu * (z[k] - outs[k - 1][0]) + slopes[k]) for k in range(1, K)]
        grads, terms = [None] * K, [None] * K
        for k in range(K):
            for s in range(w_steps):
                out, w_state[k], pull = run(k, z[k], t * w_steps + s)
                goal, scale = (y, 1.0) if k == K - 1 else (z[k + 1], mu / 2)
                terms[k] = scale * naive.squared_error(out, goal) if s == 0 else terms[k]
                grads[k] = pull(2 * scale * (out - goal) / len(x))[0]
                w[k] = updates[k](w[k], grads[k])
        kept |= {(i, k): z[k][n] for n, i in enumerate(index) for k in range(1, K)}
        yield tuple(w), tuple(w_state), dict(kept), tuple(grads), terms, mu
        values.append(sum(terms))
        if len(values) == patience:
            stalled = np.mean(values) > before - 0.01 * abs(before)
            mu, before, values = (mu * growth, np.inf, []) if stalled else (mu, np.mean(values), [])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "optimizer", "options"),
    [
        (2, "adam", {"z_steps": 1, "w_steps": 2, "penalty_growth": 3.0}),
        (3, "nesterov", {"z_steps": 2, "cached": True}),
        (4, "sgd", {"z_steps": 3, "cached": True, "penalty_growth": 3.0}),
        pytest.param(4, "sgd", {"z_steps": 0}, marks=pytest.mark.slow),
    ],
)
def test_trajectory_equals_the_equations(naive, modules, visits, run, K, optimizer, options):
    modules, batches, (ours, theirs) = modules(K), visits(5), naive.OPTIMIZERS[optimizer]
    options = {"w_steps": 1, "penalty_growth": 1.0, "penalty_patience": 2, **options}
    cached = options.pop("cached", False)
    algorithm = fr.auxiliary_coordinates(
        [naive.stage(module) for module in modules],
        naive.squared_error,
        ours(),
        penalty=0.7,
        z_learning_rate=0.2,
        cache_size=N if cached else None,
        return_grads=True,
        **options,
    )
    states, infos = run(algorithm, batches)
    expected = naive_mac(
        naive,
        modules,
        [theirs() for _ in modules],
        states[0],
        batches,
        mu=0.7,
        growth=options["penalty_growth"],
        patience=2,
        w_steps=options["w_steps"],
        z_steps=options["z_steps"],
        eta=0.2,
        cached=cached,
    )
    seen = set()
    for before, state, info, (w, w_state, kept, grads, terms, mu) in zip(
        states, states[1:], infos, expected, strict=False
    ):
        chex.assert_trees_all_close(state.params, w, **close)
        chex.assert_trees_all_close(state.model_state, w_state, **close)
        chex.assert_trees_all_close(info.grads, grads, **close)
        np.testing.assert_allclose(np.stack(before.penalty), mu, **close)
        seen.add(round(mu, 6))
        if options["w_steps"] == 1:
            errors = [info.metrics[f"coordinate_error/{k}"] for k in range(1, K)]
            np.testing.assert_allclose([*(mu / 2 * np.asarray(errors)), info.loss], terms, **close)
        for (i, k), value in kept.items() if cached else ():
            np.testing.assert_allclose(state.cache[k][i], value, **close)
    assert (len(seen) > 1) == (options["penalty_growth"] > 1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"cache_size": N}])
def test_one_stage_equals_backprop(naive, visits, run, options):
    stage = naive.stage((naive.dense(4), naive.batch_norm(), naive.dropout(0.5), naive.dense(2)))
    batches = visits(2)
    own, infos = run(fr.auxiliary_coordinates([stage], naive.squared_error, optax.adam(0.01), **options), batches)
    plain, plain_infos = run(fr.backprop([stage], naive.squared_error, optax.adam(0.01)), batches)
    for a, b in zip(own, plain, strict=True):
        chex.assert_trees_all_equal((a.params, a.model_state, a.opt_state), (b.params, b.model_state, b.opt_state))
    chex.assert_trees_all_equal(infos, plain_infos)


def numerical(f, leaves, epsilon=1e-6):
    """Central differences for every entry of every array of ``leaves``, which are changed and put back."""
    slopes = []
    for leaf in leaves:
        for at in np.ndindex(leaf.shape):
            old, values = leaf[at], []
            for sign in (1, -1):
                leaf[at] = old + sign * epsilon
                values.append(f())
            leaf[at] = old
            slopes.append((values[0] - values[1]) / (2 * epsilon))
    return np.array(slopes)


@pytest.mark.usefixtures("x64")
def test_both_steps_go_along_numerical_gradients_of_Q(naive, visits):
    """W along dQ/dW, the mean over the batch, and Z along dQ/dZ of the examples' own Q; NumPy evaluates Q."""
    modules, (batch, *_), mu, eta = [(naive.dense(width),) for width in (4, 3, 2)], visits(1), 1.7, 0.2
    stages = [naive.stage(module) for module in modules]
    make = lambda z_steps: fr.auxiliary_coordinates(
        stages,
        naive.squared_error,
        optax.sgd(0.0),
        penalty=mu,
        z_steps=z_steps,
        z_learning_rate=eta,
        cache_size=N,
        return_grads=True,
    )
    one = make(1)
    state, _ = make(2).step(make(2).init(jax.random.key(1), batch), batch)  # kept coordinates away from F_k(z_{k-1})
    after, info = one.step(state, batch)
    w = jax.tree.map(np.array, state.params)
    z, new = ([np.array(rows[batch.index]) for rows in s.cache[1:]] for s in (state, after))
    x, y = np.asarray(batch.inputs), np.asarray(batch.targets)

    def Q():
        outs = [naive.forward(m, a, (), h, [None])[0] for m, a, h in zip(modules, w, [x, *z], strict=True)]
        return naive.squared_error(outs[-1], y) + mu / 2 * sum(map(naive.squared_error, z, outs))

    moved = flat([a - b for a, b in zip(z, new, strict=True)]) * mu / eta
    np.testing.assert_allclose(moved, B * numerical(Q, z), rtol=1e-6, atol=1e-8)
    z = new
    np.testing.assert_allclose(flat(info.grads), numerical(Q, jax.tree.leaves(w)), rtol=1e-6, atol=1e-8)
    assert abs(moved).min() > 1e-6


@pytest.mark.usefixtures("x64")
def test_at_the_minimum_over_Z_the_gradients_are_those_of_backprop(naive, visits):
    """But for an error that falls as 1/mu."""
    stages, (batch, *_) = [naive.dense(width).stage for width in (4, 3, 2)], visits(1)
    plain = fr.backprop(stages, naive.squared_error, optax.sgd(0.0), return_grads=True)
    _, info = plain.step(plain.init(jax.random.key(1), batch), batch)
    gradient, errors, penalties = flat(info.grads), [], np.array([250.0, 500.0, 1000.0])
    for mu in penalties:
        fit = fr.auxiliary_coordinates(
            stages,
            naive.squared_error,
            optax.sgd(0.0),
            penalty=mu,
            penalty_growth=1,
            z_steps=60,
            z_learning_rate=0.2,
            cache_size=N,
            return_grads=True,
        )
        state = fit.init(jax.random.key(1), batch)
        for _ in range(10):
            state, info = fit.step(state, batch)
        errors.append(np.linalg.norm(flat(info.grads) - gradient) / np.linalg.norm(gradient))
    slope = np.polyfit(np.log(penalties), np.log(errors), 1)[0]
    assert -1.02 < slope < -0.98 and errors[-1] < 0.01, errors


@pytest.mark.parametrize("z_steps", [1, 2])
def test_a_step_carries_the_error_one_stage_down(naive, make_batches, run, z_steps):
    stages = [naive.dense(width).stage for width in (4, 3, 2)]
    fit = fr.auxiliary_coordinates(stages, naive.squared_error, optax.sgd(0.1), z_steps=z_steps)
    _, (info,) = run(fit, make_batches(1))
    assert [bool(info.metrics[f"gradient_norm/{k}"] > 0) for k in (1, 2, 3)] == [z_steps == 2, True, True]


def test_half_precision_keeps_coordinates_in_float32():
    """The moves of coordinates are smaller than bfloat16's spacing."""
    rng = np.random.default_rng(0)
    inputs, targets = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((16, 8), (16, 4)))
    stages = fr.partition(fr.models.mlp(4, jnp.bfloat16, depth=3, width=8), (1, 2))
    loss_fn = lambda y, z: ((y.astype(jnp.float32) - z) ** 2).sum(-1).mean()
    fit = fr.auxiliary_coordinates(stages, loss_fn, optax.sgd(0.1), z_steps=2, cache_size=16)
    batch = fr.Batch(inputs, targets, jnp.arange(16, dtype=jnp.int32))
    state, info = fit.step(fit.init(jax.random.key(0), batch), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.cache)} == {jnp.dtype("float32")}
    assert info.metrics["gradient_norm/1"] > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"penalty": 0.0}, "penalty = 0.0 was given; it must be a finite number above 0"),
        ({"penalty": (1.0,)}, r"penalty = \(1.0,\) was given"),
        ({"z_learning_rate": float("nan")}, "z_learning_rate = nan was given"),
        ({"penalty_growth": 0.5}, "penalty_growth = 0.5 was given; it is a factor, a finite number of 1 or more"),
        ({"penalty_patience": 0}, "penalty_patience = 0 was given; it must be a whole number, at least 1"),
        ({"w_steps": 0}, "w_steps = 0 was given; it must be a whole number, at least 1"),
        ({"z_steps": -1}, "z_steps = -1 was given; it must be a whole number, at least 0"),
        ({"cache_size": 0}, "cache_size = 0 was given; it must be a whole number, at least 1"),
    ],
)
def test_wrong_arguments_are_refused(naive, options, complaint):
    make = functools.partial(fr.auxiliary_coordinates, [naive.dense(2).stage], naive.squared_error, optax.sgd(0.1))
    with pytest.raises(ValueError, match=complaint):
        make(**options)


def test_a_batch_without_an_index_is_refused(naive, visits):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    fit = fr.auxiliary_coordinates(stages, naive.squared_error, optax.sgd(0.1), cache_size=N)
    with pytest.raises(ValueError, match="the batch has no index, and cache_size = 11 keeps something for every"):
        fit.init(jax.random.key(0), visits(1)[0]._replace(index=None))
