import chex
import jax
import jax.flatten_util
import numpy as np
import optax
import pytest

import fr_jax as fr

STEPS = 6
close = {"rtol": 1e-11, "atol": 1e-12}


def plain_loop(stages, loss_fn, optimizer, state, batches):
    """``jax.grad`` of the whole network and one optax transformation for all of its parameters."""

    def loss_of(params, model_state, n, batch):
        h, new_state = batch.inputs, []
        for stage, p, s, stream in zip(stages, params, model_state, state.streams, strict=True):
            h, s = stage.apply(p, s, h, key=jax.random.fold_in(stream.key, n), train=True)
            new_state.append(s)
        return loss_fn(h, batch.targets), tuple(new_state)

    gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    update = jax.jit(optimizer.update)
    params, model_state = state.params, state.model_state
    opt_state = optimizer.init(params)
    for n, batch in enumerate(batches):
        (loss, model_state), grads = gradient(params, model_state, n, batch)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield params, model_state, grads, loss


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("K", "devices", "optimizer"),
    [
        (1, 1, "sgd"),
        (3, 1, "adam"),
        (3, 2, "sgd"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1, "adam"), (3, 1, "sgd"), (3, 2, "adam"))),
    ],
)
def test_trajectory_equals_grad_and_optax(naive, make_batches, run, K, devices, optimizer):
    optimizer = optax.adam(0.01) if optimizer == "adam" else optax.sgd(0.1, momentum=0.9, nesterov=True)
    first = (naive.dense(4), naive.batch_norm(), naive.dropout(0.5))
    stages = [naive.stage(module) for module in (first, (naive.dense(5), naive.batch_norm()), (naive.dense(2),))]
    stages = stages if K == 3 else [fr.chain(*stages)]
    algorithm = fr.backprop(
        stages,
        naive.squared_error,
        optimizer,
        placement=fr.placement(K, jax.devices()[:devices]),
        return_grads=True,
    )
    batches = make_batches(STEPS)
    states, infos = run(algorithm, batches)
    start = jax.device_put(states[0]._replace(step=()), jax.devices()[0])
    expected = plain_loop(stages, naive.squared_error, optimizer, start, batches)
    for state, info, (params, model_state, grads, loss) in zip(states[1:], infos, expected, strict=True):
        chex.assert_trees_all_close(state.params, params, **close)
        chex.assert_trees_all_close(state.model_state, model_state, **close)
        chex.assert_trees_all_close(info.grads, grads, **close)
        np.testing.assert_allclose(info.loss, loss, **close)
        for k in range(1, K + 1):
            norm = np.linalg.norm(jax.flatten_util.ravel_pytree(jax.tree.map(np.asarray, grads[k - 1]))[0])
            np.testing.assert_allclose(info.metrics[f"gradient_norm/{k}"], norm, **close)


@pytest.mark.usefixtures("x64")
def test_every_module_may_have_its_own_optimizer(naive, make_batches, run):
    """The gradients are right by the test above; here each meets its own optimizer."""
    names = ["adam", "nesterov", "decaying"]
    stages = [naive.dense(4).stage, naive.dense(3).stage, naive.dense(2).stage]
    optimizers = [naive.OPTIMIZERS[name][0]() for name in names]
    updates = [naive.OPTIMIZERS[name][1]() for name in names]
    states, infos = run(fr.backprop(stages, naive.squared_error, optimizers, return_grads=True), make_batches(STEPS))
    for k, update in enumerate(updates):
        w = jax.tree.map(np.asarray, states[0].params[k])
        for state, info in zip(states[1:], infos, strict=True):
            w = update(w, jax.tree.map(np.asarray, info.grads[k]))
            chex.assert_trees_all_close(state.params[k], w, **close)


@pytest.mark.parametrize("devices", [1, 2])
def test_metrics_and_gradients_are_reported_on_request(naive, make_batches, run, devices):
    algorithm = fr.backprop(
        [naive.dense(3).stage, naive.dense(2).stage],
        naive.squared_error,
        optax.sgd(0.1),
        placement=fr.placement(2, jax.devices()[:devices]),
        metrics_fn=lambda outputs, targets: {"error": ((outputs - targets) ** 2).sum(-1).mean()},
    )
    _, (info,) = run(algorithm, make_batches(1))
    assert info.grads is None
    assert set(info.metrics) == {"gradient_norm/1", "gradient_norm/2", "error"}
    np.testing.assert_allclose(info.metrics["error"], info.loss, rtol=1e-6)
