import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

STEPS = 4
close = {"rtol": 1e-9, "atol": 1e-12}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def like(vector, tree):
    """The entries of ``vector`` in the form of ``tree``."""
    leaves, treedef = jax.tree.flatten(tree)
    parts = np.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return treedef.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def transposed_jacobian(pull, delta):
    """A' as a matrix, column by column."""
    units = np.eye(delta.size).reshape(delta.size, *delta.shape)
    return np.stack([flat(pull(unit)[0]) for unit in units], axis=1)


def conjugate_gradients(matrix, b, n):
    x, r, p = np.zeros_like(b), b, b
    for _ in range(n):
        alpha = (r @ r) / (p @ matrix @ p)
        x, new = x + alpha * p, r - alpha * matrix @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


def naive_proxprop(naive, layers, updates, start, batches, tau, solve):
    """The equations layer by layer, with matrices; ``start`` is a state of one stage that is a chain."""
    w, w_state = jax.tree.map(np.asarray, (list(start.params[0]), list(start.model_state[0])))
    for t, batch in enumerate(batches):
        key, h, pulls = jax.random.fold_in(start.streams[0].key, t), np.asarray(batch.inputs), []
        for j, layer in enumerate(layers):
            h, w_state[j], pull = layer.forward(w[j], w_state[j], h, jax.random.fold_in(key, j))
            pulls.append((pull, h.shape))
        delta, v = 2 * (h - np.asarray(batch.targets)) / len(h), [()] * len(layers)
        for j in reversed(range(len(layers))):
            pull, _ = pulls[j]
            grads, below = pull(delta)
            v[j] = grads
            if jax.tree.leaves(grads) and j < len(layers) - 1:
                A_transposed = transposed_jacobian(pull, delta)
                matrix = A_transposed @ A_transposed.T + np.eye(len(A_transposed)) / tau
                v[j] = like(solve(matrix, flat(grads)), grads)
            delta = below
        w = [update(a, g) for update, a, g in zip(updates, w, v, strict=True)]
        yield tuple(w), tuple(w_state), tuple(v), naive.squared_error(h, np.asarray(batch.targets))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("cg_steps", "optimizer"), [(1, "sgd"), (3, "adam"), (60, "nesterov")])
def test_trajectory_equals_the_equations(naive, make_batches, run, cg_steps, optimizer):
    """With as many steps as weights the solution is exact, whatever solves."""
    layers = naive.dense(4), naive.batch_norm(), naive.dropout(0.2), naive.dense(3), naive.dense(2)
    ours, theirs = naive.OPTIMIZERS[optimizer]
    algorithm = fr.proximal_backprop(
        [naive.stage(layers)], naive.squared_error, ours(), proximal_step=0.3, cg_steps=cg_steps, return_grads=True
    )
    batches = make_batches(STEPS)
    states, infos = run(algorithm, batches)
    solve = np.linalg.solve if cg_steps == 60 else lambda matrix, b: conjugate_gradients(matrix, b, cg_steps)
    updates = [theirs() for _ in layers]
    expected = naive_proxprop(naive, layers, updates, states[0], batches, 0.3, solve)
    for state, info, (w, w_state, v, loss) in zip(states[1:], infos, expected, strict=True):
        chex.assert_trees_all_close((state.params[0], state.model_state[0]), (w, w_state), **close)
        chex.assert_trees_all_close(info.grads[0], v, **close)
        np.testing.assert_allclose(info.loss, loss, **close)
        np.testing.assert_allclose(info.metrics["gradient_norm/1"], np.linalg.norm(flat(v)), **close)


@pytest.mark.usefixtures("x64")
def test_the_numbers_do_not_depend_on_the_cuts(naive, make_batches, run):
    layers = [layer.stage for layer in (naive.dense(4), naive.batch_norm(), naive.dense(3), naive.dense(2))]
    optimizer, batches = optax.sgd(0.1, momentum=0.9), make_batches(STEPS)
    ends = []
    for cuts in ((), (1, 3)):
        states, infos = run(fr.proximal_backprop(fr.partition(layers, cuts), naive.squared_error, optimizer), batches)
        ends.append((fr.layer_params(states[-1]), infos[-1].loss))
    alone, _ = run(fr.proximal_backprop(layers, naive.squared_error, optimizer), batches)  # stages that are no chains
    ends.append((fr.layer_params(alone[-1]), infos[-1].loss))
    for other in ends[1:]:
        chex.assert_trees_all_close(ends[0], other, **close)


@pytest.mark.usefixtures("x64")
def test_for_a_small_step_it_is_backprop(naive, make_batches):
    """v / tau is the gradient but for an error that is linear in tau; in the last layer v is the gradient itself."""
    stages, (batch,) = [naive.dense(4).stage, naive.dense(3).stage, naive.dense(2).stage], make_batches(1)
    plain = fr.backprop(stages, naive.squared_error, optax.sgd(0.0), return_grads=True)
    _, info = plain.step(plain.init(jax.random.key(1), batch), batch)
    gradient, errors, steps = [flat(g) for g in info.grads], [], np.array([4e-3, 2e-3, 1e-3])
    for tau in steps:
        fit = fr.proximal_backprop(
            stages, naive.squared_error, optax.sgd(0.0), proximal_step=tau, cg_steps=40, return_grads=True
        )
        _, info = fit.step(fit.init(jax.random.key(1), batch), batch)
        np.testing.assert_allclose(flat(info.grads[-1]), gradient[-1], **close)
        errors.append([np.linalg.norm(flat(v) / tau - g) for v, g in zip(info.grads[:-1], gradient, strict=False)])
    for of_stage in np.transpose(errors):
        assert 0.95 < np.polyfit(np.log(steps), np.log(of_stage), 1)[0] < 1.0


@pytest.mark.usefixtures("x64")
def test_one_layer_equals_backprop(naive, make_batches, run):
    optimizer, batches = optax.adam(0.01), make_batches(STEPS)
    own, infos = run(fr.proximal_backprop([naive.dense(2).stage], naive.squared_error, optimizer), batches)
    plain, plain_infos = run(fr.backprop([naive.dense(2).stage], naive.squared_error, optimizer), batches)
    chex.assert_trees_all_close(own[-1].params, plain[-1].params, **close)
    chex.assert_trees_all_close(infos, plain_infos, **close)


def test_convolutions_and_labels(run):
    head = lambda x: nn.Dense(3)(nn.relu(x).mean((1, 2)))
    stages = [fr.from_linen(nn.Conv(4, (3, 3))), fr.from_linen(nn.Sequential([head]))]
    rng = np.random.default_rng(0)
    batch = fr.Batch(jnp.asarray(rng.standard_normal((4, 8, 8, 3)), jnp.float32), jnp.asarray([0, 1, 2, 0]))
    loss_fn = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    states, infos = run(fr.proximal_backprop(stages, loss_fn, optax.adam(1e-3), cg_steps=2), [batch] * 3)
    assert infos[-1].loss < infos[0].loss and states[-1].step == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"proximal_step": 0.0}, "proximal_step = 0.0 was given; it must be a finite number above 0"),
        ({"proximal_step": float("inf")}, "proximal_step = inf was given"),
        ({"proximal_step": True}, "proximal_step = True was given"),
        ({"cg_steps": 0}, "cg_steps = 0 was given; it must be a whole number, at least 1"),
    ],
)
def test_wrong_arguments_are_refused(naive, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        fr.proximal_backprop([naive.dense(2).stage], naive.squared_error, optax.sgd(0.1), **options)
