import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.diagnostics.sufficient_direction import directions, full_gradient

STEPS = 6
close = {"rtol": 1e-10, "atol": 1e-12}


def naive_dfa(naive, modules, updates, start, batches):
    """The equations, module by module; yields weights, statistics, gradients and loss after each step."""
    K = len(modules)
    w, w_state, B = jax.tree.map(np.asarray, (list(start.params), list(start.model_state), start.feedback))
    keys = naive.layer_keys(modules, start)
    for t, batch in enumerate(batches):
        h, pulls = np.asarray(batch.inputs), []
        for k in range(K):
            h, w_state[k], pull = naive.forward(modules[k], w[k], w_state[k], h, keys(k, t))
            pulls.append(pull)
        e = 2 * (h - np.asarray(batch.targets)) / len(h)
        grads = [pulls[k](e if k == K - 1 else e @ B[k])[0] for k in range(K)]
        w = [updates[k](w[k], grads[k]) for k in range(K)]
        yield tuple(w), tuple(w_state), tuple(grads), naive.squared_error(h, np.asarray(batch.targets))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("K", "optimizer"), [(2, "sgd"), (3, "nesterov"), (4, "adam")])
def test_trajectory_equals_the_equations(naive, make_batches, run, K, optimizer):
    modules = [(naive.dense(4), naive.batch_norm(), naive.dropout(0.2)), (naive.dense(5),), (naive.dense(3),)]
    modules = [*modules[: K - 1], (naive.dense(4), naive.dense(2))]
    ours, theirs = naive.OPTIMIZERS[optimizer]
    stages = [naive.stage(module) for module in modules]
    algorithm = fr.direct_feedback_alignment(stages, naive.squared_error, ours(), return_grads=True)
    batches = make_batches(STEPS)
    states, infos = run(algorithm, batches)
    expected = naive_dfa(naive, modules, [theirs() for _ in modules], states[0], batches)
    for state, info, (w, w_state, grads, loss) in zip(states[1:], infos, expected, strict=True):
        chex.assert_trees_all_close(state.params, w, **close)
        chex.assert_trees_all_close(state.model_state, w_state, **close)
        chex.assert_trees_all_close(info.grads, grads, **close)
        np.testing.assert_allclose(info.loss, loss, **close)
        chex.assert_trees_all_equal(state.feedback, states[0].feedback)


@pytest.mark.usefixtures("x64")
def test_one_stage_equals_backprop(naive, make_batches, run):
    stage = naive.stage((naive.dense(4), naive.batch_norm(), naive.dropout(0.5), naive.dense(2)))
    optimizer = optax.adam(0.01)
    own, infos = run(fr.direct_feedback_alignment([stage], naive.squared_error, optimizer), make_batches(STEPS))
    plain, plain_infos = run(fr.backprop([stage], naive.squared_error, optimizer), make_batches(STEPS))
    for a, b in zip(own, plain, strict=True):
        chex.assert_trees_all_close(
            (a.params, a.model_state, a.opt_state), (b.params, b.model_state, b.opt_state), **close
        )
    chex.assert_trees_all_close(infos, plain_infos, **close)
    assert own[0].feedback == ((),)


def linear(width):
    """x W: its transposed Jacobian does not depend on x."""
    weights = lambda key, x: (jax.random.normal(key, (x.shape[-1], width), x.dtype), ())
    return fr.Stage(weights, lambda params, state, x, *, key=None, train=True: (x @ params, state))


@pytest.mark.usefixtures("x64")
def test_with_the_transposed_jacobian_it_is_backprop_on_a_linear_network(naive, make_batches, run):
    """B_k is the product of the weights above, put there before every step."""
    stages, optimizer, batches = [linear(4), linear(3), linear(2)], optax.sgd(0.02), make_batches(STEPS)
    plain, plain_infos = run(fr.backprop(stages, naive.squared_error, optimizer, return_grads=True), batches)
    algorithm = fr.direct_feedback_alignment(stages, naive.squared_error, optimizer, return_grads=True)
    state = algorithm.init(jax.random.key(1), batches[0])
    for t, batch in enumerate(batches):
        _, second, third = state.params
        state, info = algorithm.step(state._replace(feedback=((second @ third).T, third.T, ())), batch)
        chex.assert_trees_all_close(state.params, plain[t + 1].params, **close)
        chex.assert_trees_all_close(info.grads, plain_infos[t].grads, **close)


def test_feedback_may_be_arrays_or_functions(naive, make_batches, run):
    """The same numbers from a drawn, a given and a computed B_k; nothing of a function is in the state."""
    stages = [naive.dense(4).stage, naive.dense(3).stage, naive.dense(2).stage]
    make = lambda feedback: fr.direct_feedback_alignment(stages, naive.squared_error, optax.sgd(0.1), feedback=feedback)
    batches = make_batches(3)
    drawn, _ = run(make(None), batches)
    B = jax.tree.map(np.asarray, drawn[0].feedback)
    for k, features in enumerate((4, 3)):
        assert B[k].shape == (2, features) and (abs(B[k]) <= 1 / np.sqrt(features)).all() and B[k].std() > 0.1
    given, _ = run(make(B[:2]), batches)
    computed, _ = run(make([lambda e: e @ B[0], B[1]]), batches)
    assert computed[0].feedback[0] == ()
    for other in (given, computed):
        chex.assert_trees_all_close(other[-1].params, drawn[-1].params, rtol=1e-6)


def test_feedback_acts_at_each_position_of_a_sequence(run):
    """For outputs (B, T, C) and features (B, T, d) B_k is (C, d)."""
    batch = fr.Batch(jnp.ones((2, 5, 3)), jnp.zeros((2, 5, 4)))
    first, second = stages = [fr.from_linen(nn.Dense(6)), fr.from_linen(nn.Dense(4))]
    loss_fn = lambda y, z: jnp.mean((y - z) ** 2)
    (state, _), (info,) = run(fr.direct_feedback_alignment(stages, loss_fn, optax.sgd(0.1), return_grads=True), [batch])
    assert state.feedback[0].shape == (4, 6)
    h, _ = first.apply(state.params[0], {}, batch.inputs)
    e = jax.grad(loss_fn)(second.apply(state.params[1], {}, h)[0], batch.targets)
    np.testing.assert_allclose(info.grads[0]["bias"], (e @ state.feedback[0]).sum((0, 1)), rtol=1e-5, atol=1e-7)


def test_images_and_labels(run):
    head = lambda x: nn.Dense(3)(nn.relu(x).mean((1, 2)))
    stages = [fr.from_linen(nn.Conv(4, (3, 3))), fr.from_linen(nn.Sequential([head]))]
    rng = np.random.default_rng(0)
    batch = fr.Batch(jnp.asarray(rng.standard_normal((4, 8, 8, 3)), jnp.float32), jnp.asarray([0, 1, 2, 0]))
    loss_fn = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    accuracy = lambda logits, labels: {"accuracy": (logits.argmax(-1) == labels).mean()}
    algorithm = fr.direct_feedback_alignment(stages, loss_fn, optax.sgd(0.1), metrics_fn=accuracy)
    states, infos = run(algorithm, [batch] * 5)
    assert states[0].feedback[0].shape == (3, 8, 8, 4)
    assert infos[-1].loss < infos[0].loss and infos[-1].metrics["accuracy"].shape == ()


@pytest.mark.usefixtures("x64")
def test_weights_align_with_the_feedback(naive):
    """The figure of the method: the cosine to the gradient, near 0 for random weights, becomes clearly positive."""

    def small(width):
        init = lambda key, x: (0.1 * jax.random.normal(key, (x.shape[-1], width), x.dtype), ())
        return fr.Stage(init, lambda w, s, x, *, key=None, train=True: (jnp.tanh(x @ w), s))

    stages = [small(32), small(32), small(2)]
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((64, 8))
    batch = fr.Batch(jnp.asarray(inputs), jnp.asarray(np.tanh(inputs @ rng.standard_normal((8, 2)))))
    fit = fr.direct_feedback_alignment(stages, naive.squared_error, optax.sgd(0.1), return_grads=True)
    gradient = full_gradient(stages, naive.squared_error, batch)
    state, cosines = fit.init(jax.random.key(1), batch), []
    for t in range(41):
        new, info = fit.step(state, batch)
        if t in (0, 40):
            found = directions(gradient(state, [batch]), info.grads)
            cosines.append([one.cosine for one in found])
            np.testing.assert_allclose((found[-1].cosine, found[-1].norm_ratio), 1, rtol=1e-9)
        state = new
    assert max(cosines[0][:2]) < 0.3 and min(cosines[1][:2]) > 0.4


@pytest.mark.parametrize(
    ("feedback", "complaint"),
    [
        ((), "feedback has 0 entries for K = 2 stages; it needs one for each of the K-1 = 1 stages"),
        ((None,), "feedback has 1 entries .* Leave it out to have it drawn"),
        ((np.ones((4, 2)),), r"feedback 1 has shape \(4, 2\); .* it must be \(2, 4\)"),
        ((lambda e: e,), r"feedback function 1 returns float32\[6, 2\]; .* it must be float32\[6, 4\]"),
    ],
)
def test_wrong_feedback_is_refused(naive, make_batches, feedback, complaint):
    stages = [naive.dense(4).stage, naive.dense(2).stage]
    make = lambda: fr.direct_feedback_alignment(stages, naive.squared_error, optax.sgd(0.1), feedback=feedback)
    with pytest.raises(ValueError, match=complaint):
        make().init(jax.random.key(0), make_batches(1)[0])


def test_outputs_that_no_array_fits_are_refused(naive, make_batches):
    pair = fr.Stage(lambda key, x: ((), ()), lambda p, s, x, *, key=None, train=True: ({"a": x, "b": x}, s))
    loss_fn = lambda y, z: naive.squared_error(y["a"] + y["b"], z)
    fit = fr.direct_feedback_alignment([naive.dense(2).stage, pair], loss_fn, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"feedback 1 is an array .* the network returns \{'a': .* as functions e -> "):
        fit.init(jax.random.key(0), make_batches(1)[0])
