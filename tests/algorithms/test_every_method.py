"""What holds for every method alike: what is refused, and JAX's stricter modes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr

KEY = jax.random.key(0)


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def dni(stages, loss_fn, optimizer, **common):
    def apply(params, state, h, /, *, key=None, train=True):
        return params * h, state

    synthesizer = fr.Stage(lambda key, h: (jnp.ones((), h.dtype), ()), apply)
    return fr.dni(stages, loss_fn, optimizer, synthesizer, optax.sgd(1e-3), **common)


def gpipe(stages, loss_fn, optimizer, **common):
    return fr.gpipe(stages, loss_fn, optimizer, microbatches=2, **common)


def pipedream_2bw(stages, loss_fn, optimizer, **common):
    return fr.pipedream_2bw(stages, loss_fn, optimizer, microbatches=4, **common)


METHODS = [fr.backprop, fr.features_replay, fr.ddg, dni, fr.blockprop, gpipe, pipedream_2bw]
METHODS += [fr.direct_feedback_alignment, fr.proximal_backprop, fr.auxiliary_coordinates]
STEPS = {fr.blockprop: "h_steps", fr.auxiliary_coordinates: "z_steps"}
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def dense(features, **options):
    return fr.from_linen(nn.Dense(features, **options))


def batch(dtype=jnp.float32):
    return fr.Batch(jnp.ones((4, 3), dtype), jnp.ones((4, 2), dtype))


@functools.cache
def plain(method):
    """Of two layers; who asks again gets the same one, and its compiled functions."""
    return method([dense(4), dense(2)], squared_error, optax.sgd(0.1))


@every_method
def test_what_is_no_mini_batch_is_refused(method):
    algorithm = plain(method)
    state, good = algorithm.init(KEY, batch()), batch()
    for bad, said in (
        (good._replace(inputs=jnp.zeros(())), "was (given|made)"),
        ((good.inputs, good.targets), "was given a tuple as batch; it must be fr_jax.Batch"),
        (good._replace(inputs={"x": "good"}), "was given a Batch of dict and ArrayImpl as batch"),
        (good._replace(targets=None), "was given a Batch of ArrayImpl and NoneType as batch"),
    ):
        with pytest.raises(ValueError, match=r"init\(\) " + said):
            algorithm.init(KEY, bad)
        with pytest.raises(ValueError, match=r"step\(\) " + said):
            algorithm.step(state, bad)


@every_method
def test_a_loss_that_is_no_number_is_refused(method):
    algorithm = method([dense(4), dense(2)], lambda y, z: (y - z) ** 2, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"loss_fn returned float32 of shape .*one floating-point number"):
        algorithm.step(algorithm.init(KEY, batch()), batch())


@every_method
@pytest.mark.parametrize("param_dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float32])
def test_half_precision_under_strict_promotion(method, param_dtype):
    """Optimizers and networks that mix types need JAX's own promotion; the methods do not."""
    layer = lambda features: dense(features, dtype=jnp.bfloat16, param_dtype=param_dtype)
    algorithm = method([layer(4), layer(2)], squared_error, optax.sgd(0.1))
    with jax.numpy_dtype_promotion("strict"):
        state, info = algorithm.step(algorithm.init(KEY, batch(jnp.bfloat16)), batch(jnp.bfloat16))
    assert jax.tree.leaves(state.params)[0].dtype == param_dtype and jnp.isfinite(info.loss)


@every_method
def test_a_stage_that_is_not_defined_at_zero_under_debug_nans(method):
    def normalise(params, state, h, /, *, key=None, train=True):
        return params * h / jnp.linalg.norm(h, axis=-1, keepdims=True), state

    stages = [fr.chain(fr.Stage(lambda key, h: (jnp.ones(()), ()), normalise), dense(4)), dense(2)]
    algorithm = method(stages, squared_error, optax.sgd(0.1))
    with jax.debug_nans(True):
        algorithm.init(KEY, batch())


@every_method
def test_no_key_is_used_twice(method):
    algorithm = plain(method)
    with jax.debug_key_reuse(True):
        algorithm.step(algorithm.init(jax.random.key(0), batch()), batch())


@pytest.mark.parametrize(
    ("method", "cuts", "data_parallel"),
    [
        *((method, (1,), 1) for method in METHODS),
        (fr.features_replay, (2, 3), 2),
        *(pytest.param(method, (2, 3), 2, marks=pytest.mark.slow) for method in METHODS),
    ],
)
def test_dropout_masks_do_not_depend_on_the_cuts(naive, make_batches, method, cuts, data_parallel):
    """The first loss is that of the uncut network, whose layer i draws from ``fold_in(key, i)``."""
    layers = naive.dense(4), naive.dropout(0.5), naive.dropout(0.3), naive.dense(2)
    batch = make_batches(1, examples=8)[0]
    M = {gpipe: 2, pipedream_2bw: 4}.get(method, 1)
    if method in STEPS:  # which change the loss
        method = functools.partial(method, **{STEPS[method]: 0})
    stages = fr.partition([layer.stage for layer in layers], cuts)
    placement = fr.placement(len(stages), jax.devices()[:4], data_parallel)
    algorithm = method(stages, naive.squared_error, optax.sgd(0.1), placement=placement)
    state = algorithm.init(KEY, batch)
    _, info = algorithm.step(state, batch)
    keys, expected = naive.layer_keys([layers], jax.device_put(state, jax.devices()[0])), []
    for m in range(M):
        inputs, targets = (np.asarray(rows)[m::M] for rows in batch[:2])
        outputs, *_ = naive.forward(layers, *jax.tree.map(np.asarray, fr.layer_params(state)), inputs, keys(0, m))
        expected.append(naive.squared_error(outputs, targets))
    np.testing.assert_allclose(info.loss, np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize("method", [fr.features_replay, fr.ddg])
def test_the_step_is_a_number_again_after_device_put(method):
    algorithm = plain(method)
    state, _ = algorithm.step(jax.device_put(algorithm.init(KEY, batch())), batch())
    assert state.step == 1 and isinstance(state.step, int)
