import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

STEPS = 8
close = {"rtol": 1e-10, "atol": 1e-12}


def linear_synthesizer():
    """d = h * scale + shift; both are trained. Its gradient is written by hand below."""

    def init(key, h):
        return {"scale": jnp.full(h.shape[-1], 0.01, h.dtype), "shift": jnp.zeros(h.shape[-1], h.dtype)}, ()

    return fr.Stage(init, lambda p, s, h, *, key=None, train=True: (h * p["scale"][None] + p["shift"][None], s))


def naive_dni(naive, modules, update, start, batches, rate):
    """The equations, module by module, with the synthesizer's own SGD of the given rate."""
    K = len(modules)
    w, w_state, M = jax.tree.map(
        np.asarray, (list(start.params), list(start.model_state), [m.params for m in start.synthesizers])
    )
    keys = naive.layer_keys(modules, start)
    for t, batch in enumerate(batches):
        h, features, pulls = np.asarray(batch.inputs), [], []
        for k in range(K):
            h, w_state[k], pull = naive.forward(modules[k], w[k], w_state[k], h, keys(k, t))
            features.append(h)
            pulls.append(pull)
        B, targets = len(h), np.asarray(batch.targets)
        synthetic = [features[k] * M[k]["scale"] + M[k]["shift"] for k in range(K - 1)] + [2 * (h - targets) / B]
        grads, sent = zip(*(pull(d) for pull, d in zip(pulls, synthetic, strict=True)), strict=True)
        errors = []
        for k in range(K - 1):
            difference = synthetic[k] - sent[k + 1]
            examples_own = B * difference  # of the gradients of the examples' own losses
            errors.append((examples_own**2).sum(-1).mean())
            slope = 2 * B * difference
            M[k] = {
                "scale": M[k]["scale"] - rate * (slope * features[k]).sum(0),
                "shift": M[k]["shift"] - rate * slope.sum(0),
            }
        w = [update[k](w[k], grads[k]) for k in range(K)]
        yield tuple(w), tuple(w_state), tuple(M), grads, errors, naive.squared_error(h, targets)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "optimizer"),
    [
        (2, "nesterov"),
        (3, "sgd"),
        (4, "nesterov"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "sgd"), (3, "nesterov"), (4, "sgd"))),
    ],
)
def test_trajectory_equals_the_equations(naive, make_batches, run, K, optimizer):
    modules = [(naive.dense(4), naive.batch_norm(), naive.dropout(0.2)), (naive.dense(5),), (naive.dense(3),)]
    modules = [*modules[: K - 1], (naive.dense(2),)]
    ours, theirs = naive.OPTIMIZERS[optimizer]
    algorithm = fr.dni(
        [naive.stage(module) for module in modules],
        naive.squared_error,
        ours(),
        linear_synthesizer(),
        optax.sgd(0.02),
        return_grads=True,
    )
    batches = make_batches(STEPS)
    states, infos = run(algorithm, batches)
    expected = naive_dni(naive, modules, [theirs() for _ in modules], states[0], batches, rate=0.02)
    for state, info, (w, w_state, M, grads, errors, loss) in zip(states[1:], infos, expected, strict=True):
        chex.assert_trees_all_close(state.params, w, **close)
        chex.assert_trees_all_close(state.model_state, w_state, **close)
        chex.assert_trees_all_close(tuple(m.params for m in state.synthesizers), M, **close)
        chex.assert_trees_all_close(info.grads, grads, **close)
        np.testing.assert_allclose(info.loss, loss, **close)
        for k, error in enumerate(errors, start=1):
            np.testing.assert_allclose(info.metrics[f"synthesizer_error/{k}"], error, **close)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(optax.sgd(0.1, momentum=0.9), marks=pytest.mark.slow), optax.adam(0.01)],
    ids=["momentum", "adam"],
)
def test_with_the_true_gradient_it_is_backprop(naive, make_batches, run, optimizer):
    """Oracle 5. The synthesizer's weights are those of the modules above it, put there before every step."""
    stages = [naive.stage((naive.dense(4), naive.batch_norm())), naive.dense(5).stage, naive.dense(2).stage]

    def true_gradient(k):
        def loss_of(h, targets, params):
            for stage, p in zip(stages[k + 1 :], params, strict=True):
                h, _ = stage.apply(p, (), h)
            return naive.squared_error(h, targets)

        def init(key, x):
            h, params = x[0], []
            for stage in stages[k + 1 :]:
                p, _ = stage.init(key, h)
                h, _ = stage.apply(p, (), h)
                params.append(p)
            return tuple(params), ()

        return fr.Stage(init, lambda p, s, x, *, key=None, train=True: (jax.grad(loss_of)(*x, p), s))

    synthesizers = [true_gradient(0), true_gradient(1)]
    dni = fr.dni(
        stages, naive.squared_error, optimizer, synthesizers, optax.sgd(0.0), label_conditioning=True, return_grads=True
    )
    batches = make_batches(STEPS)
    plain, plain_infos = run(fr.backprop(stages, naive.squared_error, optimizer, return_grads=True), batches)
    state = dni.init(jax.random.key(1), batches[0])
    for t, batch in enumerate(batches):
        told = tuple(M._replace(params=state.params[k + 1 :]) for k, M in enumerate(state.synthesizers))
        state, info = dni.step(state._replace(synthesizers=told), batch)
        chex.assert_trees_all_close(state.params, plain[t + 1].params, **close)
        chex.assert_trees_all_close(state.model_state, plain[t + 1].model_state, **close)
        chex.assert_trees_all_close(info.grads, plain_infos[t].grads, **close)
        np.testing.assert_allclose([info.metrics[f"synthesizer_error/{k}"] for k in (1, 2)], 0, atol=1e-20)


@pytest.mark.usefixtures("x64")
def test_one_module_equals_backprop(naive, make_batches, run):
    stage = naive.stage((naive.dense(4), naive.batch_norm(), naive.dropout(0.5), naive.dense(2)))
    optimizer = optax.adam(0.01)
    own, _ = run(fr.dni([stage], naive.squared_error, optimizer, (), optax.adam(0.1)), make_batches(STEPS))
    plain, _ = run(fr.backprop([stage], naive.squared_error, optimizer), make_batches(STEPS))
    for a, b in zip(own, plain, strict=True):
        chex.assert_trees_all_equal((a.params, a.model_state, a.opt_state), (b.params, b.model_state, b.opt_state))


def test_initial_weights_are_those_of_the_other_methods(naive, make_batches, run):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    batches = make_batches(1)
    dni = fr.dni(stages, naive.squared_error, optax.sgd(0.1), fr.models.synthesizer(), optax.adam(0.1))
    (mine, *_), _ = run(dni, batches)
    (theirs, *_), _ = run(fr.backprop(stages, naive.squared_error, optax.sgd(0.1)), batches)
    chex.assert_trees_all_equal(mine.params, theirs.params)


def test_a_synthesizer_learns_the_gradient(naive, run):
    """With the network held still and one mini-batch, the error falls to nearly nothing."""
    stages = [naive.dense(6).stage, naive.dense(6).stage, naive.dense(2).stage]
    rng = np.random.default_rng(0)
    batch = fr.Batch(*(jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32) for shape in ((16, 3), (16, 2))))
    dni = fr.dni(stages, naive.squared_error, optax.sgd(0.0), fr.models.synthesizer(hidden=64), optax.adam(0.01))
    _, infos = run(dni, [batch] * 200)
    # M_2 sees the true gradient from the start. M_1 is taught by M_2, whose lesson stands still in the end.
    for k in (1, 2):
        errors = np.array([info.metrics[f"synthesizer_error/{k}"] for info in infos])
        assert errors[-1] < 0.02 * errors[:100].max()


@pytest.mark.parametrize("conditioned", [False, True])
def test_images_and_labels(run, conditioned):
    """The synthesizers of the paper on convolutions; one stage serves features of all shapes."""
    head = lambda x: nn.Dense(3, kernel_init=nn.initializers.zeros)(x.mean((1, 2)))
    layers = nn.Conv(16, (3, 3)), nn.Conv(8, (3, 3), strides=2), nn.Sequential([head])
    stages = [fr.from_linen(layer) for layer in layers]
    rng = np.random.default_rng(0)
    batch = fr.Batch(
        jnp.asarray(rng.standard_normal((4, 8, 8, 3)), jnp.float32), jnp.asarray(rng.integers(0, 3, 4), jnp.int32)
    )
    loss_fn = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    synthesizer = fr.models.synthesizer(3 if conditioned else None)
    algorithm = fr.dni(stages, loss_fn, optax.sgd(0.1), synthesizer, optax.adam(1e-3), label_conditioning=conditioned)
    states, infos = run(algorithm, [batch] * 4)
    assert np.isfinite([info.loss for info in infos]).all()
    assert infos[0].metrics["gradient_norm/1"] == 0  # the output layer starts at zero
    assert infos[3].metrics["gradient_norm/1"] > 0
    kernel = states[0].synthesizers[0].params["Conv_0"]["kernel"]
    assert kernel.shape == (5, 5, 16 + 3 * conditioned, 16)


@pytest.mark.parametrize(
    ("synthesizers", "optimizer", "complaint"),
    [
        ((), optax.sgd(0.1), "0 synthesizers were given for K = 2 stages; there is one for each of the K-1 = 1"),
        ((fr.models.synthesizer(),) * 2, optax.sgd(0.1), "2 synthesizers were given"),
        ((None,), optax.sgd(0.1), "synthesizer 1 is None; each must be an fr_jax.Stage"),
        (fr.models.synthesizer(), 0.1, "synthesizer_optimizer 0.1 is not an optax transformation"),
    ],
)
def test_wrong_synthesizers_are_refused(naive, synthesizers, optimizer, complaint):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    with pytest.raises(ValueError, match=complaint):
        fr.dni(stages, naive.squared_error, optax.sgd(0.1), synthesizers, optimizer)


def test_a_synthesizer_of_the_wrong_shape_is_refused(naive, make_batches):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    dni = fr.dni(stages, naive.squared_error, optax.sgd(0.1), naive.dense(3).stage, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"synthesizer 1 returns .*3.* the output of stage 1, so it must return"):
        dni.init(jax.random.key(0), make_batches(1)[0])
