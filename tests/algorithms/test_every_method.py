"""What holds for every method alike: what is refused, and JAX's stricter modes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import fr_jax as fr

KEY = jax.random.key(0)


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def dni(stages, loss_fn, optimizer):
    def apply(params, state, h, /, *, key=None, train=True):
        return params * h, state

    synthesizer = fr.Stage(lambda key, h: (jnp.ones((), h.dtype), ()), apply)
    return fr.dni(stages, loss_fn, optimizer, synthesizer, optax.sgd(1e-3))


def gpipe(stages, loss_fn, optimizer):
    return fr.gpipe(stages, loss_fn, optimizer, microbatches=2)


def pipedream_2bw(stages, loss_fn, optimizer):
    return fr.pipedream_2bw(stages, loss_fn, optimizer, microbatches=4)


METHODS = [fr.backprop, fr.features_replay, fr.ddg, dni, fr.blockprop, gpipe, pipedream_2bw]
METHODS += [fr.direct_feedback_alignment, fr.proximal_backprop]
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


@pytest.mark.parametrize("method", [fr.features_replay, fr.ddg])
def test_the_step_is_a_number_again_after_device_put(method):
    algorithm = plain(method)
    state, _ = algorithm.step(jax.device_put(algorithm.init(KEY, batch())), batch())
    assert state.step == 1 and isinstance(state.step, int)
