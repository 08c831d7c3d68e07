import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

STEPS = 8
N, B = 11, 4  # examples in the data set of `visits`, and in a mini-batch
close = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def modules(naive):
    """``K -> modules``; dropout and running statistics are among them."""

    def modules(K):
        blocks = (naive.dense(4), naive.dropout(0.2)), (naive.dense(3), naive.batch_norm()), (naive.dense(5),)
        return [*blocks[: K - 1], (naive.dense(2),)]

    return modules


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    return rng.uniform(-1, 1, (N, 3)), rng.uniform(-1, 1, (N, 2))


@pytest.fixture
def visits(data):
    """``epochs -> batches``: each epoch in an order of its own, and without its last N % B examples."""

    def visits(epochs):
        rng = np.random.default_rng(6)
        orders = [rng.permutation(N)[: N - N % B].reshape(-1, B) for _ in range(epochs)]
        return [batch_of(data, index) for index in np.concatenate(orders)]

    return visits


def batch_of(data, index):
    return fr.Batch(*(jnp.asarray(d[np.asarray(index)]) for d in data), jnp.asarray(index, jnp.int32))


def naive_blockprop(naive, modules, updates, start, batches, penalty, h_steps, rates, *, cached, h_every=1):
    """Algorithms 1 and 2, example by example where they differ; yields weights, statistics, h*, gradients, losses."""
    K = len(modules)
    w, w_state = jax.tree.map(np.asarray, (list(start.params), list(start.model_state)))
    keys = naive.layer_keys(modules, start)
    kept, seen = {}, {}
    for t, batch in enumerate(batches):
        x, y = np.asarray(batch.inputs), np.asarray(batch.targets)
        index = np.asarray(batch.index).tolist() if cached else range(t * len(x), (t + 1) * len(x))
        run = [
            functools.partial(lambda m, w, w_state, key, h: naive.forward(m, w, w_state, h, key), *block)
            for block in zip(modules, w, w_state, [keys(k, t) for k in range(K)], strict=True)
        ]
        p, h = [None], [x]
        for k in range(1, K):
            p.append(run[k - 1](h[k - 1])[0])
            h.append(np.stack([kept.get((i, k), p[k][n]) for n, i in enumerate(index)]))
        for k in reversed(range(1, K)):
            for _ in range(h_steps):
                out, _, pull = run[k](h[k])
                slope = 2 * (out - y) if k == K - 1 else 2 * penalty[k] * (out - h[k + 1])
                new = h[k] - rates[k - 1] * (pull(slope)[1] + 2 * penalty[k - 1] * (h[k] - p[k]))
                h[k] = np.stack([new[n] if seen.get(i, 0) % h_every == 0 else h[k][n] for n, i in enumerate(index)])
        grads, losses = [], []
        for k in range(K):
            out, w_state[k], pull = run[k](h[k])
            target, scale = (y, 1.0) if k == K - 1 else (h[k + 1], penalty[k])
            grads.append(pull(2 * scale * (out - target) / len(x))[0])
            losses.append(naive.squared_error(out, target))
        w = [update(a, g) for update, a, g in zip(updates, w, grads, strict=True)]
        for n, i in enumerate(index):
            seen[i] = seen.get(i, 0) + 1
            kept |= {(i, k): h[k][n] for k in range(1, K)} if cached else {}
        yield tuple(w), tuple(w_state), dict(kept), tuple(grads), losses, dict(seen)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "optimizer", "options"),
    [
        (2, "sgd", {"h_steps": 1}),
        pytest.param(2, "nesterov", {"h_steps": 3, "cached": True, "h_every": 2}, marks=pytest.mark.slow),
        pytest.param(3, "nesterov", {"h_steps": 2}, marks=pytest.mark.slow),
        (3, "sgd", {"h_steps": 2, "cached": True}),
        (4, "nesterov", {"h_steps": 2, "cached": True, "h_every": 3}),
        (4, "sgd", {"h_steps": 0}),
    ],
)
def test_trajectory_equals_the_equations(naive, modules, visits, run, K, optimizer, options):
    penalty, rates = (0.7, 1.3, 0.4)[: K - 1], (0.2, 0.05, 0.1)[: K - 1]
    modules, batches, (ours, theirs) = modules(K), visits(5), naive.OPTIMIZERS[optimizer]
    options = {"cached": False, "h_every": 1, **options}
    algorithm = fr.blockprop(
        [naive.stage(module) for module in modules],
        naive.squared_error,
        ours(),
        penalty=penalty,
        h_steps=options["h_steps"],
        h_learning_rate=rates,
        cache_size=N if options["cached"] else None,
        h_every=options["h_every"],
        return_grads=True,
    )
    states, infos = run(algorithm, batches)
    updates = [theirs() for _ in modules]
    expected = naive_blockprop(naive, modules, updates, states[0], batches, penalty=penalty, rates=rates, **options)
    for state, info, (w, w_state, kept, grads, losses, seen) in zip(states[1:], infos, expected, strict=True):
        chex.assert_trees_all_close(state.params, w, **close)
        chex.assert_trees_all_close(state.model_state, w_state, **close)
        chex.assert_trees_all_close(info.grads, grads, **close)
        np.testing.assert_allclose(info.loss, losses[-1], **close)
        np.testing.assert_allclose([info.metrics[f"gluing_loss/{k}"] for k in range(1, K)], losses[:-1], **close)
        norms = [np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad))) for grad in grads]
        np.testing.assert_allclose([info.metrics[f"gradient_norm/{k}"] for k in range(1, K + 1)], norms, **close)
        assert options["h_steps"] > 0 or norms[:-1] == [0.0] * (K - 1)
        if options["cached"]:
            for (i, k), value in kept.items():
                np.testing.assert_allclose(state.cache[k][i], value, **close)
            for mine in state.visits:
                np.testing.assert_array_equal(mine, [seen.get(i, 0) for i in range(N)])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"cache_size": N, "h_every": 2}])
def test_one_block_equals_backprop(naive, visits, run, options):
    stage = naive.stage((naive.dense(4), naive.batch_norm(), naive.dropout(0.5), naive.dense(2)))
    own, infos = run(fr.blockprop([stage], naive.squared_error, optax.adam(0.01), **options), visits(3))
    plain, plain_infos = run(fr.backprop([stage], naive.squared_error, optax.adam(0.01)), visits(3))
    for a, b in zip(own, plain, strict=True):
        chex.assert_trees_all_equal((a.params, a.model_state, a.opt_state), (b.params, b.model_state, b.opt_state))
    chex.assert_trees_all_equal(infos, plain_infos)


@pytest.fixture
def network(naive, data):
    """Four examples, a network of tanh layers, and K -> its modules; for what the theorems say."""
    return batch_of(data, range(B)), lambda K: [(naive.dense(width),) for width in (3, 4, 2)[3 - K :]]


def settled(naive, modules, batch, sweeps, **options):
    """The state and info after many sweeps over the same examples, the weights held still."""
    stages = [naive.stage(module) for module in modules]
    algorithm = fr.blockprop(stages, naive.squared_error, optax.sgd(0.0), cache_size=N, return_grads=True, **options)
    state = algorithm.init(jax.random.key(1), batch)
    for _ in range(sweeps):
        state, info = algorithm.step(state, batch)
    return state, info


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.usefixtures("x64")
def test_block_gradients_are_numerical_gradients_of_J(naive, modules, visits, run):
    """Oracle 6, with batch normalisation and dropout; J_k is evaluated by the NumPy layers."""
    K, penalty, blocks, batches = 3, (0.7, 1.3), modules(3), visits(1)
    stages = [naive.stage(block) for block in blocks]
    algorithm = fr.blockprop(
        stages,
        naive.squared_error,
        optax.sgd(0.1),
        penalty=penalty,
        h_steps=2,
        h_learning_rate=0.1,
        cache_size=N,
        return_grads=True,
    )
    states, infos = run(algorithm, batches)
    for t, (batch, state, after, info) in enumerate(zip(batches, states, states[1:], infos, strict=False)):
        h = [np.asarray(batch.inputs), *(np.asarray(cache)[batch.index] for cache in after.cache[1:])]
        goals = [*h[1:], np.asarray(batch.targets)]
        for k in range(K):
            leaves, treedef = jax.tree.flatten(jax.tree.map(np.array, state.params[k]))
            key = naive.layer_keys(blocks, state)(k, t)

            w_state = jax.tree.map(np.asarray, state.model_state[k])

            def J(leaves, k=k, key=key, treedef=treedef, w_state=w_state, h_in=h[k], goal=goals[k]):
                out, _, _ = naive.forward(blocks[k], treedef.unflatten(leaves), w_state, h_in, key)
                return (penalty[k] if k < K - 1 else 1.0) * naive.squared_error(out, goal)

            np.testing.assert_allclose(flat(info.grads[k]), numerical(J, leaves), rtol=1e-6, atol=1e-8)


def numerical(f, leaves, epsilon=1e-6):
    """Central differences for every entry of every array of ``leaves``, which are changed and put back."""
    slopes = []
    for leaf in leaves:
        for at in np.ndindex(leaf.shape):
            old = leaf[at]
            values = []
            for sign in (1, -1):
                leaf[at] = old + sign * epsilon
                values.append(f(leaves))
            leaf[at] = old
            slopes.append((values[0] - values[1]) / (2 * epsilon))
    return np.array(slopes)


@pytest.mark.usefixtures("x64")
def test_lemma_B1(naive, network):
    """The reported gradient is the total derivative of J(w) = min_h L(h, w), which a NumPy loop minimises."""
    batch, modules = network[0], network[1](3)
    penalty, x, y = (0.7, 1.3), np.asarray(batch.inputs), np.asarray(batch.targets)
    state, info = settled(naive, modules, batch, 300, penalty=penalty, h_steps=5, h_learning_rate=0.1)
    weights = jax.tree.map(np.array, state.params)
    h = [np.asarray(cache)[batch.index] for cache in state.cache[1:]]

    def minimum(w):
        h2, h3 = h  # where the search starts does not matter
        b1 = naive.forward(modules[0], w[0], (), x, [None])[0]
        while True:
            b2, _, pull2 = naive.forward(modules[1], w[1], (), h2, [None])
            b3, _, pull3 = naive.forward(modules[2], w[2], (), h3, [None])
            slope2 = 2 * penalty[0] * (h2 - b1) + pull2(2 * penalty[1] * (b2 - h3))[1]
            slope3 = 2 * penalty[1] * (h3 - b2) + pull3(2 * (b3 - y))[1]
            if max(abs(slope2).max(), abs(slope3).max()) < 1e-9:
                costs = penalty[0] * (h2 - b1) ** 2, penalty[1] * (h3 - b2) ** 2, (b3 - y) ** 2
                return sum(cost.sum() for cost in costs) / B
            h2, h3 = h2 - 0.1 * slope2, h3 - 0.1 * slope3

    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(lambda w: rng.uniform(-1, 1, w.shape), weights)
        J = lambda s, d=direction: minimum(jax.tree.map(lambda w, v: w + s * v, weights, d))
        total = (J(1e-5) - J(-1e-5)) / 2e-5
        np.testing.assert_allclose(flat(info.grads) @ flat(direction), total, rtol=1e-6)
        assert abs(total) > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("K", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_theorem_5_1(naive, network, K):
    """With lambda = 1 / beta, block 1's gradient is back-propagation's but for an error that is linear in beta."""
    batch, modules = network[0], network[1](K)
    stages = [naive.stage(module) for module in modules]
    plain = fr.backprop(stages, naive.squared_error, optax.sgd(0.0), return_grads=True)
    _, info = plain.step(plain.init(jax.random.key(1), batch), batch)
    expected, errors, betas = flat(info.grads[0]), [], np.array([4e-3, 2e-3, 1e-3])
    for beta in betas:
        options = {"penalty": 1 / beta, "h_steps": 5, "h_learning_rate": beta * (0.5 if K == 2 else 0.1)}
        _, info = settled(naive, modules, batch, 4 if K == 2 else 80, **options)
        errors.append(np.linalg.norm(flat(info.grads[0]) - expected) / np.linalg.norm(expected))
    slope = np.polyfit(np.log(betas), np.log(errors), 1)[0]
    assert 0.98 < slope < 1.02, errors
    assert errors[-1] < 0.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("product", [1.0, 0.02])
def test_one_h_step_scales_the_gradient_of_backprop(naive, network, product):
    """Block 1's gradient is exact where 2 lambda gamma = 1, and falls by that factor for every cut."""
    batch, modules = network[0], network[1](3)
    stages = [naive.stage(module) for module in modules]
    plain = fr.backprop(stages, naive.squared_error, optax.sgd(0.0), return_grads=True)
    _, info = plain.step(plain.init(jax.random.key(1), batch), batch)
    options = {} if product == 0.02 else {"penalty": (0.25, 5), "h_learning_rate": (2, 0.1)}
    _, own = settled(naive, modules, batch, 1, **options)
    np.testing.assert_allclose(flat(own.grads[0]), product**2 * flat(info.grads[0]), **close)


@pytest.mark.usefixtures("x64")
def test_h_of_an_example_does_not_depend_on_its_batch(naive, data):
    stages = [naive.dense(4).stage, naive.dense(3).stage, naive.dense(2).stage]
    algorithm = fr.blockprop(stages, naive.squared_error, optax.sgd(0.1), cache_size=N, h_steps=3, h_learning_rate=0.1)
    caches = []
    for index in (range(2), [5, 1, 2, 3, 4, 0, 6, 7]):
        batch = batch_of(data, index)
        state, _ = algorithm.step(algorithm.init(jax.random.key(1), batch), batch)
        caches.append([cache[:2] for cache in state.cache[1:]])
        assert not any(cache[8:].any() for cache in state.cache[1:])
    chex.assert_trees_all_close(*caches, **close)


@pytest.mark.usefixtures("x64")
def test_an_index_outside_the_cache_is_new_each_time_and_touches_nothing(naive, data, run):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    make = functools.partial(fr.blockprop, stages, naive.squared_error, optax.sgd(0.1), h_learning_rate=0.1)
    batch = batch_of(data, range(B))
    plain, plain_infos = run(make(), [batch] * 3)
    outside = batch._replace(index=np.array([-1, N, -N, 2**31 - 1], np.int32))
    states, infos = run(make(cache_size=N, h_every=2), [outside] * 3)
    for a, b in zip(states, plain, strict=True):
        chex.assert_trees_all_close(a.params, b.params, **close)
        assert not any(leaf.any() for leaf in jax.tree.leaves((a.cache, a.visits)))
    chex.assert_trees_all_close(infos, plain_infos, **close)
    mixed, _ = run(make(cache_size=N), [batch._replace(index=np.array([3, -1, N, -N], np.int32))] * 3)
    chex.assert_trees_all_equal(np.flatnonzero(mixed[-1].visits[0]), np.array([3]))
    chex.assert_trees_all_equal(np.flatnonzero(mixed[-1].cache[1].any(1)), np.array([3]))


@pytest.mark.parametrize(("h_every", "expected"), [(1, [3, 6, 9]), (2, [3, 4, 7])])
def test_where_no_example_is_due_only_the_W_step_is_computed(naive, data, h_every, expected):
    """The middle one of three blocks counts its forward passes: forward, h-step, W-step."""
    calls = []

    def apply(params, state, x, *, key=None, train=True):
        jax.debug.callback(lambda: calls.append(None))
        return naive.dense(3).stage.apply(params, state, x)

    stages = [naive.dense(4).stage, fr.Stage(naive.dense(3).stage.init, apply), naive.dense(2).stage]
    algorithm = fr.blockprop(stages, naive.squared_error, optax.sgd(0.1), cache_size=N, h_every=h_every)
    batch, totals = batch_of(data, range(B)), []
    state = algorithm.init(jax.random.key(1), batch)
    calls.clear()
    for _ in range(3):
        state, _ = algorithm.step(state, batch)
        jax.effects_barrier()
        totals.append(len(calls))
    assert totals == expected


def test_donation_frees_what_was_kept(naive, visits):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    algorithm = fr.blockprop(stages, naive.squared_error, optax.sgd(0.1), cache_size=N, donate=True)
    batches = visits(1)
    state = algorithm.init(jax.random.key(1), batches[0])
    for batch in batches:
        old = state
        state, _ = algorithm.step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.cache, old.visits)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((batches, state.cache, state.visits)))


def test_the_number_of_h_steps_compiles_nothing_more(naive, make_batches, run, compilations):
    stages = [naive.dense(4).stage, naive.dense(3).stage, naive.dense(2).stage]
    compiled = []
    for h_steps in (1, 4):
        compilations.clear()
        run(fr.blockprop(stages, naive.squared_error, optax.sgd(0.1), h_steps=h_steps), make_batches(2))
        compiled.append(sum("backend_compile" in name and "h_step" in name for name in compilations))
    assert compiled == [2, 2]


def test_images_and_labels(run):
    """Convolutions with batch normalisation, in single precision, with metrics of the outputs."""

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
            return nn.Dense(3)(nn.relu(x).mean((1, 2)))

    stages = [fr.from_linen(nn.Conv(16, (3, 3))), fr.from_linen(Head())]
    rng = np.random.default_rng(0)
    inputs, labels = rng.standard_normal((4, 8, 8, 3)), rng.integers(0, 3, 4)
    batch = fr.Batch(jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32), jnp.arange(4))
    loss_fn = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    accuracy = lambda logits, labels: {"accuracy": (logits.argmax(-1) == labels).mean()}
    algorithm = fr.blockprop(
        stages, loss_fn, optax.sgd(0.01), h_learning_rate=0.1, cache_size=4, h_every=2, metrics_fn=accuracy
    )
    states, infos = run(algorithm, [batch] * 3)
    assert np.isfinite([[info.loss, info.metrics["gluing_loss/1"], info.metrics["accuracy"]] for info in infos]).all()
    assert states[0].cache[1].shape == (4, 8, 8, 16)
    chex.assert_trees_all_equal(states[1].cache, states[2].cache)  # not due
    assert (states[2].cache[1] != states[3].cache[1]).any()
    assert infos[0].grads is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"penalty": (1.0, 2.0)}, "penalty has 2 entries; K = 2 stages have 1 gluing variables, one each"),
        ({"h_learning_rate": ()}, "h_learning_rate has 0 entries"),
        ({"penalty": 0.0}, "penalty = 0.0 must be a finite number above 0"),
        ({"penalty": [-1.0]}, r"penalty = \[-1.0\] must be"),
        ({"penalty": None}, "penalty = None must be"),
        ({"h_learning_rate": float("nan")}, "h_learning_rate = nan must be"),
        ({"h_learning_rate": float("inf")}, "h_learning_rate = inf must be"),
        ({"h_learning_rate": True}, "h_learning_rate = True must be"),
        ({"h_steps": -1}, "h_steps = -1 was given; it must be a whole number, at least 0"),
        ({"h_steps": 1.0}, "h_steps = 1.0 was given"),
        ({"h_steps": None}, "h_steps = None was given"),
        ({"cache_size": 0}, "cache_size = 0 was given; it must be a whole number, at least 1"),
        ({"cache_size": 5, "h_every": 0}, "h_every = 0 was given; it must be a whole number, at least 1"),
        ({"h_every": 2}, "h_every = 2 needs what earlier visits kept: pass cache_size"),
        ({"placement": ()}, "placement has 0 entries"),
    ],
)
def test_wrong_arguments_are_refused(naive, options, complaint):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    with pytest.raises(ValueError, match=complaint):
        fr.blockprop(stages, naive.squared_error, optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (None, r"the batch has no index, and cache_size = 11 keeps something for every example: pass .* index \(4,\)"),
        (np.zeros(3, np.int32), r"the batch has an index int32 of shape \(3,\)"),
        (np.zeros((4, 1), np.int32), r"of shape \(4, 1\)"),
        (np.zeros(4), "the batch has an index float64"),
    ],
)
def test_a_wrong_index_is_refused(naive, data, index, complaint):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    algorithm = fr.blockprop(stages, naive.squared_error, optax.sgd(0.1), cache_size=N)
    batch = batch_of(data, range(B))
    state = algorithm.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match=complaint):
        algorithm.init(jax.random.key(0), batch._replace(index=index))
    with pytest.raises(ValueError, match=complaint):
        algorithm.step(state, batch._replace(index=index))


def test_blocks_that_compute_in_bfloat16_still_learn():
    """The moves of gluing variables are smaller than bfloat16's spacing, so these are float32, in the cache as well."""
    rng = np.random.default_rng(0)
    shapes = (16, 8), (16, 4)
    inputs, targets = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    batch = fr.Batch(inputs, targets, jnp.arange(16, dtype=jnp.int32))
    loss_fn = lambda y, z: ((y.astype(jnp.float32) - z) ** 2).sum(-1).mean()
    grads = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        stages = fr.partition(fr.models.mlp(4, dtype, depth=3, width=32), (1, 2))
        algorithm = fr.blockprop(stages, loss_fn, optax.sgd(0.1), cache_size=16, return_grads=True)
        state, info = algorithm.step(algorithm.init(jax.random.key(0), batch), batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.cache)} == {jnp.dtype("float32")}
        grads[dtype] = [flat(jax.tree.map(lambda g: np.asarray(g, np.float32), grad)) for grad in info.grads]
    for exact, rounded in zip(grads[jnp.float32], grads[jnp.bfloat16], strict=True):
        cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
        assert cosine > 0.95
