import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fr_jax as fr
from fr_jax.algorithms._losses import gradient_norm

METHODS = [fr.backprop, fr.features_replay]
METHODS_IN_FLIGHT = [fr.features_replay, fr.ddg]
KEY = jax.random.key(3)


@pytest.fixture
def make(naive):
    """``(stages, optimizer=..., placement=...) -> Algorithm``; an int stands for that many dense stages."""

    def make(method, stages=2, optimizer=None, **kwargs):
        if isinstance(stages, int):
            stages = [naive.dense(2).stage] * stages
        return method(stages, naive.squared_error, optax.sgd(0.1) if optimizer is None else optimizer, **kwargs)

    return make


BATCH = fr.Batch(np.zeros((6, 3), np.float32), np.zeros((6, 2), np.float32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stages": 0}, "0 stages were given; .* at least one.* fr_jax.partition"),
        ({"stages": [lambda x: x]}, r"stage 1 is <function .*each must be an fr_jax.Stage.*from_linen"),
        (
            {"optimizer": [optax.sgd(0.1)] * 3},
            "3 optimizers were given for K = 2 stages. Pass one .* or a sequence of 2",
        ),
        ({"optimizer": 0.1}, r"optimizer 0.1 is not an optax transformation.*optax.sgd\(0.1\).*a sequence of 2"),
        ({"optimizer": [optax.sgd(0.1), None]}, "optimizer None is not an optax transformation"),
        ({"placement": fr.placement(3)}, r"placement has 3 entries for K = 2 stages; .*fr_jax.placement\(2\)"),
        ({"placement": fr.placement(1)[0]}, r"placement is the single sharding .*a sequence of K = 2"),
        (
            {"placement": jax.devices()[:2]},
            r"placement entry 1 is .*must be a jax.sharding.Sharding.*fr_jax.placement\(2",
        ),
    ],
)
def test_bad_settings_are_refused(make, method, given, said):
    with pytest.raises(ValueError, match=said):
        make(method, **given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"targets": np.zeros((6, 1), np.float32)},
            r"targets \(\(6, 1\).*targets \(\(6, 2\).*init\(\) with the new shapes",
        ),
        ({"inputs": np.zeros((6, 3), np.int32)}, "'int32'.*'float32'"),
        ({"inputs": {"x": np.zeros((6, 3), np.float32)}}, r"inputs \{'x': .*for inputs \(\(6, 3\)"),
    ],
)
def test_a_batch_of_another_shape_or_dtype_is_refused(make, method, changed, said):
    algorithm = make(method)
    state = algorithm.init(KEY, BATCH)
    with pytest.raises(ValueError, match=said):
        algorithm.step(state, BATCH._replace(**changed))


@pytest.mark.parametrize("method", METHODS_IN_FLIGHT)
def test_features_in_flight_need_batches_of_one_size(make, method):
    algorithm = make(method)
    with pytest.raises(ValueError, match=r"\(5, 3\), 'float32'.*\(6, 3\), 'float32'.*drop or pad"):
        algorithm.step(algorithm.init(KEY, BATCH), jax.tree.map(lambda x: x[:5], BATCH))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_and_targets_of_different_sizes_are_refused(make, method):
    algorithm = make(method)
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        algorithm.step(algorithm.init(KEY, BATCH), BATCH._replace(inputs=BATCH.inputs[:5]))


@pytest.mark.parametrize("method", METHODS)
def test_numpy_doubles_are_what_they_become_on_a_device(make, method):
    algorithm = make(method)
    state = algorithm.init(KEY, fr.Batch(*(np.asarray(x, np.float64) for x in BATCH[:2])))
    for batch in (BATCH, fr.Batch(*(np.asarray(x, np.float64) for x in BATCH[:2])), jax.tree.map(jnp.asarray, BATCH)):
        state, info = algorithm.step(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, info.loss))} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            BATCH._replace(targets=np.zeros((1, 2), np.float32)),
            r"inputs of shape \(6, 3\) and targets of shape \(1, 2\)",
        ),
        (jax.tree.map(lambda x: x[:0], BATCH), r"the same number of examples, at least one"),
        (
            BATCH._replace(inputs={"image": "a path"}),
            r"a Batch of dict and ndarray.*fr_jax.Batch\(inputs, targets\)",
        ),
        (BATCH._replace(inputs={"image": BATCH.inputs, "mask": BATCH.inputs[:5]}), "the same number of examples"),
        (tuple(BATCH[:2]), r"a tuple as batch"),
    ],
)
def test_what_is_no_mini_batch_is_refused(make, batch, said):
    with pytest.raises(ValueError, match=said):
        make(fr.features_replay).init(KEY, batch)


@pytest.mark.parametrize("method", METHODS)
def test_functions_that_return_something_else_are_refused(naive, method):
    stages = [naive.dense(2).stage] * 2
    state = method(stages, naive.squared_error, optax.sgd(0.1)).init(KEY, BATCH)
    for options, said in (
        ({"loss_fn": lambda y, z: (y.mean(), {})}, "loss_fn returned a tuple of .*a dict; .*metrics_fn"),
        ({"loss_fn": lambda y, z: ((y - z) ** 2).mean(1)}, r"loss_fn returned float32 of shape \(6,\); .*one floating"),
        ({"metrics_fn": lambda y, z: y.mean()}, "metrics_fn returned a .*must be a dict"),
        (
            {"metrics_fn": lambda y, z: {"gradient_norm/1": y.mean(), "loss": 0.0}},
            "'gradient_norm/1', 'loss'.*other names",
        ),
    ):
        functions = {"loss_fn": naive.squared_error, **options}
        algorithm = method(stages, functions.pop("loss_fn"), optax.sgd(0.1), **functions)
        with pytest.raises(ValueError, match=said):
            algorithm.step(state, BATCH)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_placement_all_is_on_the_default_device(make, method):
    algorithm = make(method, 3)
    state = algorithm.init(KEY, BATCH)
    elsewhere, here = jax.devices()[1], jax.devices()[0]
    for device in (elsewhere, elsewhere, here, elsewhere):
        state, info = algorithm.step(state, jax.device_put(BATCH, device))
    leaves = jax.tree.leaves((state, info))
    assert {leaf.devices() == {here} for leaf in leaves if isinstance(leaf, jax.Array)} == {True}
    assert algorithm.predict(state, jax.device_put(BATCH.inputs, elsewhere)).devices() == {here}


def test_a_layer_that_does_not_fit_says_which_it_is(make, naive):
    wants_three = fr.Stage(lambda key, x: (jnp.ones((3, 2)), ()), lambda w, s, x, *, key=None, train=True: (x @ w, s))
    with pytest.raises(TypeError) as caught:
        make(fr.features_replay, [naive.dense(5).stage, wants_three]).init(KEY, BATCH)
    assert (
        caught.value.__notes__[-1] == "This is layer 1 (from 0) of the network, in stage 2; its input is float32[6, 5]."
    )


def test_gradient_norms_of_half_precision_do_not_overflow():
    assert gradient_norm({"w": jnp.full(100, 300.0, jnp.float16)}) == 3000.0


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_cannot_be_split_is_refused(make, method):
    algorithm = make(method, placement=fr.placement(2, data_parallel=4))
    with pytest.raises(ValueError, match=r"6 examples cannot be split over data_parallel = 4 .*multiple of 4"):
        algorithm.init(KEY, BATCH)


@pytest.mark.parametrize("method", METHODS)
def test_integers_across_a_cut_are_refused(make, naive, method):
    step_function = fr.Stage(
        lambda key, x: ((), ()), lambda params, state, x, *, key=None, train=True: (x.astype(jnp.int32), state)
    )
    embed = fr.Stage(
        lambda key, x: (jnp.ones((3, 2)), ()),
        lambda params, state, x, *, key=None, train=True: (params[x].sum(1), state),
    )
    algorithm = make(method, [naive.dense(3).stage, step_function, embed])
    with pytest.raises(ValueError, match=r"stage 2 sends int32 of shape \(6, 3\) to stage 3; .*Move the cut"):
        algorithm.init(KEY, BATCH)
    tokens = BATCH._replace(inputs=np.ones((6, 3), np.int32))
    algorithm = make(method, [embed, naive.dense(2).stage])  # the network's own input may be integer
    state = algorithm.init(KEY, tokens)
    for _ in range(3):
        state, _ = algorithm.step(state, tokens)
    assert not np.array_equal(state.params[0], np.ones((3, 2)))


@pytest.mark.parametrize("method", METHODS)
def test_one_stage_needs_no_list(make, naive, method):
    state = make(method, naive.dense(2).stage).init(KEY, BATCH)
    assert len(state.params) == 1


@pytest.mark.parametrize("method", METHODS)
def test_initial_weights_depend_on_the_key_and_not_on_the_cuts(make, naive, method):
    layers = [
        layer.stage for layer in (naive.dense(3), naive.dense(3), naive.batch_norm(), naive.dense(3), naive.dense(2))
    ]
    inits = []
    for cuts in [(), (2,), (1, 3), (1, 2, 4)]:
        state = make(method, fr.partition(layers, cuts)).init(KEY, BATCH)
        inits.append(tuple(layer for stage in state.params for layer in stage))
    for other in inits[1:]:
        chex.assert_trees_all_equal(inits[0], other)
    kernels = [layer["W"] for layer in inits[0] if "W" in layer]
    assert not np.array_equal(kernels[0], kernels[1])  # equal layers, different weights
    other_key = make(method, fr.partition(layers, ())).init(jax.random.key(4), BATCH)
    assert not np.array_equal(kernels[0], other_key.params[0][0]["W"])


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_stage_starts_like_a_chain_of_one(make, naive, method):
    plain = make(method, [naive.dense(3).stage, naive.dense(2).stage]).init(KEY, BATCH)
    chained = make(method, [fr.chain(naive.dense(3).stage), fr.chain(naive.dense(2).stage)]).init(KEY, BATCH)
    chex.assert_trees_all_equal(plain.params, tuple(layer for (layer,) in chained.params))


def test_streams_have_the_same_key_and_count_mini_batches(make):
    algorithm = make(fr.features_replay, 3)
    state = algorithm.init(KEY, BATCH)
    assert len({tuple(np.asarray(jax.random.key_data(stream.key))) for stream in state.streams}) == 1
    for _ in range(4):
        state, _ = algorithm.step(state, BATCH)
    assert [int(stream.count) for stream in state.streams] == [4, 4, 4] and state.step == 4


class Sown(nn.Module):
    reduced: bool

    @nn.compact
    def __call__(self, x):
        options = {"reduce_fn": lambda old, new: new, "init_fn": lambda: jnp.zeros(())} if self.reduced else {}
        self.sow("seen", "mean", x.mean(), **options)
        return nn.Dense(2)(x)


def test_a_state_that_grows_is_refused_at_init(naive):
    """It would be compiled anew in every step, and no checkpoint of it could be restored."""
    make = lambda reduced: fr.features_replay([fr.from_linen(Sown(reduced))], naive.squared_error, optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"state of another form.*\['seen'\]\['mean'\]\[1\] is float32\[\] and was missing"
    ):
        make(False).init(KEY, BATCH)
    algorithm = make(True)
    state, _ = algorithm.step(algorithm.init(KEY, BATCH), BATCH)
    np.testing.assert_allclose(state.model_state[0]["seen"]["mean"], BATCH.inputs.mean(), rtol=1e-6)


def test_a_state_that_changes_its_type_is_refused_at_init(naive):
    wide = fr.Stage(
        lambda key, x: ((), {"n": jnp.zeros(2, jnp.int32)}),
        lambda p, s, x, *, key=None, train=True: (x, {"n": s["n"].astype(jnp.float32)}),
    )
    with pytest.raises(ValueError, match=r"\['n'\] is float32\[2\] and was int32\[2\]") as caught:
        fr.ddg([naive.dense(2).stage, wide], naive.squared_error, optax.sgd(0.1)).init(KEY, BATCH)
    assert "layer 1 (from 0) of the network, in stage 2" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", [fr.backprop, fr.features_replay, fr.ddg])
def test_a_state_of_other_stages_is_refused(naive, method):
    layers = [naive.dense(2).stage] * 3
    make = lambda cuts: method(fr.partition(layers, cuts), naive.squared_error, optax.sgd(0.1))
    state = make((1, 2)).init(KEY, BATCH)
    for cuts in ((1,), (2,), ()):
        with pytest.raises(ValueError, match=r"a state of K = 3 stages with \(1, 1, 1\) layers"):
            make(cuts).step(state, BATCH)


@pytest.mark.parametrize("method", [fr.backprop, fr.features_replay])
def test_weights_of_other_shapes_are_named(method):
    """A user's own weights in a state: the network fails beneath the library, which looks for the reason then."""
    layers = [fr.from_linen(nn.Dense(4)), fr.from_linen(nn.LayerNorm()), fr.from_linen(nn.Dense(2))]
    fit = method(fr.partition(layers, (1,)), lambda y, t: ((y - t) ** 2).mean(), optax.adam(0.1))
    batch = fr.Batch(jnp.ones((4, 3)), jnp.zeros((4, 2)))
    state = fit.init(jax.random.key(0), batch)
    norm, dense = state.params[1]
    wide = state._replace(params=(state.params[0], (norm, dense | {"kernel": jnp.ones((5, 2))})))
    right = r"params\[1\]\[1\]\['kernel'\] is of shape \(5, 2\); in this algorithm's network it is of shape \(4, 2\)\."
    for call, given in (fit.step, batch), (fit.predict, batch.inputs):
        with pytest.raises(ValueError, match=rf"^{call.__name__}\(\) was given a state in which {right}"):
            call(wide, given)
    less = state._replace(params=(state.params[0], (norm, {"bias": dense["bias"]})))
    with pytest.raises(ValueError, match=r"\['kernel'\] is missing; in this .* it is of shape \(4, 2\)"):
        fit.step(less, batch)
    fit.step(state, batch)
