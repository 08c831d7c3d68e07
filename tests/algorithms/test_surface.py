"""The contract that every method shares: starting points, pytrees, batch sizes, optimizers that see the loss."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms._layers import carry_over

KEY = jax.random.key(0)
LAYERS = [fr.from_linen(layer) for layer in (nn.Dense(4), nn.BatchNorm(use_running_average=None), nn.Dense(3))]
LAYERS += [fr.from_linen(nn.Dense(2))]


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def dni(stages, loss_fn, optimizer, **options):
    synthesizer = fr.Stage(
        lambda key, h: (jnp.ones((), h.dtype), ()), lambda w, s, h, *, key=None, train=True: (w * h, s)
    )
    return fr.dni(stages, loss_fn, optimizer, synthesizer, optax.sgd(1e-3), **options)


def gpipe(stages, loss_fn, optimizer, **options):
    return fr.gpipe(stages, loss_fn, optimizer, microbatches=2, **options)


def micro_replay(stages, loss_fn, optimizer, **options):
    return fr.features_replay(stages, loss_fn, optimizer, microbatches=2, **options)


def pipedream_2bw(stages, loss_fn, optimizer, **options):
    return fr.pipedream_2bw(stages, loss_fn, optimizer, microbatches=4, **options)


IN_FLIGHT = [fr.features_replay, micro_replay, fr.ddg, pipedream_2bw]
SYNCHRONOUS = [fr.backprop, gpipe, fr.direct_feedback_alignment, fr.proximal_backprop]
METHODS = [*SYNCHRONOUS, *IN_FLIGHT, dni, fr.blockprop, fr.auxiliary_coordinates]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def make(method, cuts=(1, 3), optimizer=None, **options):
    return method(fr.partition(LAYERS, cuts), squared_error, optimizer or optax.adam(0.1), **options)


def batch(B=4, seed=0):
    rng = np.random.default_rng(seed)
    return fr.Batch(*(rng.standard_normal((B, n)).astype(np.float32) for n in (3, 2)))


@functools.cache
def trained(method, cuts=(1, 3), optimizer=None):
    """An algorithm and its state after four steps; who asks again gets the same, and its compiled functions."""
    algorithm = make(method, cuts, optimizer)
    state = algorithm.init(KEY, batch())
    for t in range(4):
        state, _ = algorithm.step(state, batch(seed=t))
    return algorithm, state


@every_method
def test_init_starts_from_given_weights_by_stage_or_by_layer(method):
    algorithm, state = trained(method)
    by_layer = fr.layer_params(state)
    assert [len(part) for part in by_layer] == [4, 4]
    fresh = algorithm.init(jax.random.key(9), batch())
    for params, model_state in ((state.params, state.model_state), by_layer, jax.tree.map(np.asarray, by_layer)):
        again = algorithm.init(jax.random.key(9), batch(), params, model_state)
        chex.assert_trees_all_equal((again.params, again.model_state), (state.params, state.model_state))
        chex.assert_trees_all_equal(again.opt_state, fresh.opt_state)
    elsewhere = make(fr.backprop, (2,)).init(jax.random.key(9), batch(), *by_layer)  # another K, another method
    chex.assert_trees_all_equal(fr.layer_params(elsewhere), by_layer)


def test_optimizer_states_are_made_from_given_weights():
    algorithm = make(fr.features_replay, optimizer=optax.contrib.schedule_free_adamw(0.1))
    _, state = trained(fr.features_replay)
    warm = algorithm.init(KEY, batch(), state.params)
    for k in range(3):
        chex.assert_trees_all_equal(optax.tree.get(warm.opt_state[k], "z"), state.params[k])


def test_given_weights_stay_valid_after_a_step_that_donates():
    algorithm, state = trained(fr.features_replay)
    donating = make(fr.features_replay, donate=True)
    donating.step(donating.init(KEY, batch(), state.params, state.model_state), batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.model_state)))
    algorithm.step(state, batch())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda params: params[:2], r"params with 2 entries; .* one per stage, .*K = 3.* one per layer \(L = 4\)"),
        (lambda params: ({}, *params[1:]), r"params for layer 0 that are \{\}; this layer has \{'bias': \(4,\)"),
        (lambda params: (jax.tree.map(lambda w: w.T, params[0]), *params[1:]), r"layer 0 .*'kernel': \(4, 3\)"),
    ],
)
def test_weights_of_another_network_are_refused(change, said):
    algorithm, state = trained(fr.features_replay)
    with pytest.raises(ValueError, match=said):
        algorithm.init(KEY, batch(), change(fr.layer_params(state)[0]))


OPTIMIZERS = {"momentum": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(0.1), "muon": optax.contrib.muon(0.1)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_is_carried_over_to_other_cuts(optimizer):
    """Back-propagation does not depend on the cuts: from a state that was carried over it goes on as before."""
    algorithm, state = trained(fr.backprop, optimizer=optimizer)
    other = make(fr.backprop, (2,), optimizer)
    moved = carry_over(state, other.init(jax.random.key(9), batch()))
    for t in range(6):
        state, info = algorithm.step(state, batch(seed=10 + t))
        moved, moved_info = other.step(moved, batch(seed=10 + t))
        # The bias before batch normalisation has no gradient but rounding errors, which Adam makes steps of.
        np.testing.assert_allclose(moved_info.loss, info.loss, rtol=1e-5)


def test_a_state_of_another_optimizer_is_not_carried_over():
    _, state = trained(fr.backprop)
    with pytest.raises(ValueError, match=r"the opt_state of the two states differ"):
        carry_over(state, make(fr.backprop, optimizer=optax.sgd(0.1)).init(KEY, batch()))


@every_method
def test_inputs_and_targets_may_be_pytrees(method):
    """Named arrays instead of one: the same numbers."""
    first = fr.from_linen(nn.Dense(4))
    split = fr.Stage(
        lambda key, x: first.init(key, jnp.concatenate([x["a"], x["b"]], 1)),
        lambda p, s, x, **options: first.apply(p, s, jnp.concatenate([x["a"], x["b"]], 1), **options),
    )
    loss_fn = lambda y, z: squared_error(y, jnp.stack([z["left"], z["right"]], 1))
    optimizer = optax.sgd(0.1)
    plain = method([first, LAYERS[-1]], squared_error, optimizer)
    named = method([split, LAYERS[-1]], loss_fn, optimizer)
    rename = lambda b: fr.Batch(
        {"a": b.inputs[:, :1], "b": b.inputs[:, 1:]}, {"left": b.targets[:, 0], "right": b.targets[:, 1]}
    )
    a, b = plain.init(KEY, batch()), named.init(KEY, rename(batch()))
    for t in range(4):
        a, a_info = plain.step(a, batch(seed=t))
        b, b_info = named.step(b, rename(batch(seed=t)))
    np.testing.assert_allclose(a_info.loss, b_info.loss, rtol=1e-6)
    chex.assert_trees_all_close(a.params, b.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        plain.predict(a, batch().inputs), named.predict(b, rename(batch()).inputs), rtol=1e-5, atol=1e-6
    )


@every_method
def test_another_batch_size_is_welcome_where_nothing_is_in_flight(method):
    algorithm, state = trained(method)
    if method in IN_FLIGHT:
        with pytest.raises(ValueError, match="Features in flight have those shapes"):
            algorithm.step(state, batch(8))
    else:
        state, info = algorithm.step(state, batch(8))
        assert jnp.isfinite(info.loss)


def test_predict_takes_any_number_of_rows():
    algorithm, state = trained(fr.features_replay)
    split = make(fr.features_replay, placement=fr.placement(3, jax.devices()[:2], data_parallel=2))
    elsewhere = split.init(KEY, batch(), state.params, state.model_state)
    for N in (1, 3, 4, 7):
        inputs = batch(N, seed=5).inputs
        expected = algorithm.predict(state, inputs)
        assert expected.shape == (N, 2)
        np.testing.assert_allclose(split.predict(elsewhere, inputs), expected, rtol=1e-5, atol=1e-6)


def by_loss():
    """An optimizer whose step is the loss: what it is given as ``value`` can be read off the weights."""

    def update(grads, state, params=None, *, value, **extra):
        return jax.tree.map(lambda g: jnp.full_like(g, value), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.parametrize("method", [*SYNCHRONOUS, *IN_FLIGHT], ids=lambda method: method.__name__)
@pytest.mark.parametrize("devices", [1, 3])
def test_optimizers_receive_the_loss_of_their_mini_batch(method, devices):
    """Stage k moves at iteration t by the loss of mini-batch t+k-K (delayed methods), t-1 (micro-batches) or t."""
    placement = fr.placement(3, jax.devices()[:devices])
    algorithm = make(method, optimizer=by_loss(), placement=placement)
    state = algorithm.init(KEY, batch())
    losses = []
    for t in range(5):
        old = state
        state, info = algorithm.step(state, batch(seed=t))
        losses.append(float(info.loss))
        for k in range(3):
            late = 2 - k if method in IN_FLIGHT else 0
            late = min(late, 1) if method in (micro_replay, pipedream_2bw) else late
            moved = jax.tree.map(lambda new, old: float((new - old).mean()), state.params[k], old.params[k])
            expected = losses[t - late] if t >= late else 0.0
            np.testing.assert_allclose(jax.tree.leaves(moved), expected, rtol=1e-4, atol=1e-6)


def test_states_hold_no_losses_for_optimizers_that_do_not_use_them():
    for optimizer in OPTIMIZERS.values():
        state = make(fr.features_replay, optimizer=optimizer).init(KEY, batch())
        assert jax.tree.leaves(state.losses) == []


@every_method
def test_making_a_method_touches_no_device(method, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("a device was asked for")

    for name in ("devices", "local_devices", "device_put"):
        monkeypatch.setattr(jax, name, refuse)
    make(method)


@every_method
def test_the_callables_explain_themselves(method):
    algorithm = make(method)
    assert "the state before the first step" in algorithm.init.__doc__
    assert "one iteration t of the method" in algorithm.step.__doc__
    assert "inference mode" in algorithm.predict.__doc__
