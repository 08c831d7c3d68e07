"""What holds for every method alike: what is refused, and JAX's stricter modes."""

import functools
from contextlib import nullcontext

import chex
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


class Tensor:
    """Of another library: shape and dtype, and neither is NumPy's."""

    shape, dtype = (4, 3), "torch.float32"

    def numpy(self):
        return np.ones(self.shape, np.float32)


@every_method
@pytest.mark.parametrize(
    "bad", [Tensor(), np.full((4, 3), "a"), np.full((4, 3), None)], ids=["tensor", "text", "objects"]
)
def test_arrays_that_are_no_numbers_are_refused(method, bad):
    algorithm = plain(method)
    state, advice = algorithm.init(KEY, batch()), r".* A Tensor of another library .*\.numpy" * isinstance(bad, Tensor)
    with pytest.raises(ValueError, match=r"init\(\) was given a Batch of \w+ and ArrayImpl" + advice):
        algorithm.init(KEY, batch()._replace(inputs=bad))
    with pytest.raises(ValueError, match=r"step\(\) was given a Batch of ArrayImpl and \w+ as batch" + advice):
        algorithm.step(state, batch()._replace(targets=bad))
    with pytest.raises(ValueError, match=r"predict\(\) was given a \w+ as inputs" + advice):
        algorithm.predict(state, bad)


def test_predict_refuses_what_has_no_rows():
    algorithm = plain(fr.backprop)
    state = algorithm.init(KEY, batch())
    for bad, said in (
        ([[1.0, 2.0, 3.0]], "a list as inputs; it must be an array"),
        ((), "a tuple as inputs; it must be an array"),
        (np.float32(1), r"inputs of shape \(\); all must have the same number of examples"),
        ((np.ones((4, 3)), np.ones((5, 3))), r"inputs of shape \(\(4, 3\), \(5, 3\)\); all must have"),
    ):
        with pytest.raises(ValueError, match=r"predict\(\) was given " + said):
            algorithm.predict(state, bad)


@pytest.mark.parametrize("method", [fr.backprop, fr.features_replay, fr.ddg])
def test_a_donated_state_is_named(method):
    algorithm = method([dense(4), dense(2)], squared_error, optax.adam(0.1), donate=True)
    old = algorithm.init(KEY, batch())
    new, _ = algorithm.step(old, batch())
    for called, call in (
        ("step", lambda: algorithm.step(old, batch())),
        ("predict", lambda: algorithm.predict(old, batch().inputs)),
        ("layer_params", lambda: fr.layer_params(old)),
        ("init", lambda: algorithm.init(KEY, batch(), old.params)),
    ):
        with pytest.raises(ValueError, match=rf"{called}\(\) was given arrays that are gone, in \w+: .*donate=False"):
            call()
    gone = batch()
    gone.inputs.delete()
    with pytest.raises(ValueError, match=r"step\(\) was given arrays that are gone, in batch: "):
        algorithm.step(new, gone)
    algorithm.step(new, batch())


def test_integers_among_the_weights_are_refused():
    counting = fr.Stage(
        lambda key, x: ({"w": jnp.ones(3), "n": jnp.zeros(2, int)}, ()), lambda p, s, x, **_: (x * p["w"], s)
    )
    algorithm = fr.features_replay([dense(3), counting, dense(2)], squared_error, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"params\['n'\] of this layer is int32\[2\]; .* its state") as caught:
        algorithm.init(KEY, batch())
    assert "This is layer 1" in caught.value.__notes__[0]


def test_narrow_weights_are_warned_of():
    """In bfloat16 a weight of 1 does not move by 1/512, and by 1/100 it does."""
    algorithm = fr.backprop([dense(2, param_dtype=jnp.bfloat16)], squared_error, optax.sgd(0.1))
    with pytest.warns(UserWarning, match=r"weights in bfloat16, .* less than 0\.002 of a weight .*param_dtype=float32"):
        algorithm.init(KEY, batch())
    w = jnp.ones((), jnp.bfloat16)
    assert w - jnp.asarray(1 / 513, w.dtype) == w and w - jnp.asarray(1 / 100, w.dtype) != w


def test_multi_steps_objects_are_refused():
    """What they make is an optimizer: of four updates two move the weights."""
    wrapped = optax.MultiSteps(optax.sgd(0.1), 2)
    for optimizer in (wrapped, [optax.sgd(0.1), wrapped]):
        with pytest.raises(ValueError, match=r"an optax.MultiSteps .*\.gradient_transformation\(\)"):
            fr.backprop([dense(4), dense(2)], squared_error, optimizer)
    algorithm = fr.backprop([dense(4), dense(2)], squared_error, wrapped.gradient_transformation())
    state, moved = algorithm.init(KEY, batch()), []
    for _ in range(4):
        old, (state, _) = state, algorithm.step(state, batch())
        moved.append(bool((jax.tree.leaves(old.params[1])[1] != jax.tree.leaves(state.params[1])[1]).any()))
    assert moved == [False, True, False, True]


@pytest.mark.parametrize(
    "method",
    [
        *(fr.features_replay, gpipe, dni),
        *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in (fr.features_replay, gpipe, dni)),
    ],
)
def test_a_plateau_reduces_the_rate_of_every_stage(method):
    """Weights that do not move have a loss that does not fall."""
    optimizer = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
    algorithm = method([dense(4), dense(2)], squared_error, optimizer)
    state = algorithm.init(KEY, batch())
    if method is dni:
        with pytest.raises(
            ValueError, match=r"update cannot be called \(.*'value'\): this stage gives it no value=loss"
        ):
            algorithm.step(state, batch())
        return
    for _ in range(6):
        state, _ = algorithm.step(state, batch())
    assert max(float(optax.tree.get(opt_state, "scale")) for opt_state in state.opt_state) <= 0.5


def test_an_optimizer_that_asks_for_more_is_named():
    def update(grads, state, params=None, *, value, hessian, **extra):
        return grads, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    algorithm = fr.backprop([dense(2)], squared_error, optimizer)
    with pytest.raises(ValueError, match=r"'hessian'\): this stage gives it value=loss and nothing else"):
        algorithm.step(algorithm.init(KEY, batch()), batch())


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
    warns = pytest.warns(UserWarning, match="weights in bfloat16") if param_dtype == jnp.bfloat16 else nullcontext()
    with jax.numpy_dtype_promotion("strict"), warns:
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


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("D", [2, 4])
def test_split_weights_give_the_same_numbers(method, D):
    """On D devices a stage, each weight, statistic and momentum split along its largest axis that D divides."""
    normed = nn.Sequential([nn.Dense(16, use_bias=False), nn.BatchNorm(use_running_average=None)])
    layers = [fr.from_linen(normed), dense(8), dense(2)]
    batches = [
        fr.Batch(jax.random.normal(jax.random.key(t), (16, 12)), jax.random.normal(jax.random.key(-t - 1), (16, 2)))
        for t in range(4)
    ]
    ends = []
    for shard in (False, True):
        places = fr.placement(2, data_parallel=D, shard_params=shard)
        algorithm = method(fr.partition(layers, (2,)), squared_error, optax.adam(0.01), placement=places, donate=shard)
        state = algorithm.init(KEY, batches[0])
        losses = []
        for each in batches:
            state, info = algorithm.step(state, each)
            losses.append(info.loss)
        outputs = algorithm.predict(state, batches[0].inputs)
        ends.append(jax.device_get((losses, outputs, state.params, state.opt_state, state.model_state)))
    chex.assert_trees_all_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.model_state)):
        divides = [size for size in leaf.shape if size % D == 0]
        part = leaf.addressable_shards[0].data
        assert part.size * (D if divides else 1) == leaf.size
        assert not divides or leaf.sharding.spec.index("shards") == leaf.shape.index(max(divides))
