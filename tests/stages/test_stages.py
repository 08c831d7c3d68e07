import copy

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def plus(number, traces=None):
    """A user's own stage: two plain functions, no parameters."""

    def apply(params, state, x, *, key=None, train=True):
        if traces is not None:
            traces.append(x.shape)
        return x + number, state

    return fr.Stage(lambda key, x: ((), ()), apply)


KEYS = fr.Stage(  # outputs the key that it was given
    lambda key, x: (jax.random.key_data(key), ()),
    lambda params, state, x, *, key=None, train=True: (x, jax.random.key_data(key) if train else state),
)


class Flags(nn.Module):
    """Outputs the flags that it was given."""

    @nn.compact
    def __call__(self, x, train=None, deterministic=None, use_running_average=None, scale=1):
        return jnp.array([train, deterministic, use_running_average]), scale


class TrainOnly(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x * 2 if train else x


@pytest.mark.parametrize("train", [True, False])
def test_linen_flags_follow_train(train):
    flags, scale = fr.from_linen(Flags()).apply({}, {}, X, train=train)[0]
    assert (flags.tolist(), scale) == ([train, not train, not train], 1)
    np.testing.assert_array_equal(fr.from_linen(TrainOnly()).apply({}, {}, X, train=train)[0], X * 2 if train else X)


def test_call_kwargs_win_over_the_flags():
    flags, scale = fr.from_linen(Flags(), use_running_average=True, scale=3).apply({}, {}, X, train=True)[0]
    assert (flags.tolist(), scale) == ([True, False, True], 3)


class Noisy(nn.Module):
    """Dropout and batch norm, in a mode of any name and default."""

    mode: str = "train"
    given: bool = False

    @nn.compact
    def __call__(self, x, train=False, training=False, is_training=False):
        on = {"train": train, "training": training, "is_training": is_training, "never": self.given}[self.mode]
        return nn.BatchNorm(use_running_average=None)(
            nn.Dropout(0.5)(x, deterministic=not on), use_running_average=not on
        )


class PassesAll(nn.Module):
    @nn.compact
    def __call__(self, x, **kwargs):
        return Noisy()(nn.Dense(3, name="plain")(x, **kwargs), **kwargs)


@pytest.mark.parametrize(
    "module",
    [
        *(Noisy(mode) for mode in ("train", "training", "is_training")),
        PassesAll(),
        nn.Sequential([nn.Dense(3), Noisy(), nn.relu, Noisy("training")]),
        nn.Sequential([nn.Sequential([Noisy()]), nn.Dropout(0.5), nn.BatchNorm()]),
    ],
    ids=lambda module: f"{type(module).__name__}-{getattr(module, 'mode', '')}",
)
@pytest.mark.filterwarnings("error")
def test_every_layer_is_told_its_mode(module):
    stage = fr.from_linen(module)
    params, state = stage.init(KEY, X)
    outputs = [stage.apply(params, state, X, key=jax.random.key(n), train=True) for n in (1, 2)]
    assert not np.array_equal(outputs[0][0], outputs[1][0])
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), state, outputs[0][1])
    assert jax.tree.leaves(moved) and all(jax.tree.leaves(moved))
    still = [stage.apply(params, state, X, key=jax.random.key(n), train=False) for n in (1, 2)]
    chex.assert_trees_all_equal(*still)
    chex.assert_trees_all_equal(still[0][1], state)


def test_a_layer_that_stays_in_inference_mode_is_named():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Noisy("never", name="block")(x)

    stage = fr.from_linen(Inner())
    params, state = stage.init(KEY, X)
    with pytest.warns(UserWarning, match=r"block/(Dropout|BatchNorm)_0 of Inner is called with .*=True in training"):
        stage.apply(params, state, X, key=KEY, train=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "stage",
    [
        fr.from_linen(nn.Dropout(0.0)),
        fr.from_linen(nn.Sequential([nn.BatchNorm(use_running_average=True), nn.Dropout(0.5, deterministic=True)])),
        fr.from_linen(nn.Dropout(0.5), deterministic=True),
    ],
)
def test_inference_mode_on_purpose_is_not_named(stage):
    params, state = stage.init(KEY, X)
    y, same = stage.apply(params, state, X, key=KEY, train=True)
    chex.assert_trees_all_equal(same, state)
    np.testing.assert_allclose(y, X, rtol=1e-4)


def test_linen_state_moves_in_training_only():
    stage = fr.from_linen(nn.BatchNorm(momentum=0.9))
    params, state = stage.init(KEY, X)
    assert set(params) == {"scale", "bias"} and set(state) == {"batch_stats"}
    y, new = stage.apply(params, state, X, key=KEY, train=True)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    y, same = stage.apply(params, new, X, train=False)
    chex.assert_trees_all_equal(same, new)
    running = jax.tree.map(np.asarray, new["batch_stats"])
    np.testing.assert_allclose(y, (np.asarray(X) - running["mean"]) / np.sqrt(running["var"] + 1e-5), rtol=1e-4)


def test_the_key_is_the_dropout_stream():
    stage = fr.from_linen(nn.Dropout(0.5))
    assert stage.init(KEY, X) == ({}, {})
    one, again, other = (stage.apply({}, {}, X, key=jax.random.key(i), train=True)[0] for i in (1, 1, 2))
    expected = nn.Dropout(0.5, deterministic=False).apply({}, X, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(one, expected)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(stage.apply({}, {}, X, train=False)[0], X)


def test_equal_modules_are_one_stage():
    assert fr.from_linen(nn.Dense(3)) is fr.from_linen(nn.Dense(3))
    assert fr.from_linen(nn.Dense(3)) is not fr.from_linen(nn.Dense(4))
    assert fr.from_linen(Flags(), scale=2) is not fr.from_linen(Flags())


class Times(nn.Module):
    by: float

    def __call__(self, x):
        return x * self.by


def test_equal_numbers_of_another_kind_are_other_stages():
    whole, real = fr.from_linen(Times(2)), fr.from_linen(Times(2.0))
    assert whole is not real
    x = jnp.ones((2, 3), jnp.int32)
    assert [stage.apply({}, {}, x)[0].dtype for stage in (whole, real)] == [jnp.int32, jnp.float32]


class LargestSeen(nn.Module):
    """Its state starts with what the input is."""

    @nn.compact
    def __call__(self, x, train=False):
        seen = self.variable("seen", "largest", lambda: jnp.abs(x).max())
        return x / seen.value


def test_a_state_may_start_from_the_input():
    stage = fr.from_linen(LargestSeen())
    _, state = stage.init(KEY, 4.0 * jnp.ones((2, 3)))
    assert state["seen"]["largest"] == 4.0
    np.testing.assert_array_equal(stage.apply({}, state, jnp.ones((1, 3)))[0], np.full((1, 3), 0.25))
    _, state = stage.init(KEY, jax.ShapeDtypeStruct((2, 3), jnp.float32))  # stands for zeros
    assert state["seen"]["largest"] == 0.0


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Sequential([nn.Dense(5), nn.relu]), (4, 3)), (nn.Conv(5, [3]), (4, 6, 3))],
    ids=["Sequential", "Conv"],
)
def test_modules_that_hold_lists_are_welcome(module, shape):
    stage = fr.from_linen(module)
    params, state = stage.init(KEY, jnp.ones(shape))
    y, _ = stage.apply(params, state, jnp.ones(shape))
    np.testing.assert_array_equal(y, module.apply({"params": params}, jnp.ones(shape)))


def test_chain_runs_its_layers_in_order():
    double = fr.Stage(lambda key, x: ((), ()), lambda params, state, x, *, key=None, train=True: (2 * x, state))
    net = fr.chain(plus(1.0), double, plus(-3.0))
    params, state = net.init(KEY, X)
    y, new_state = net.apply(params, state, X)
    np.testing.assert_allclose(y, 2 * (X + 1) - 3, rtol=1e-6)
    assert params == state == new_state == ((), (), ())
    assert isinstance(net, fr.Stage) and len(net.layers) == 3


def test_chain_folds_the_place_of_a_layer_into_the_key():
    net = fr.chain(KEYS, KEYS, fr.chain(KEYS, KEYS))

    def data(*places):
        key = KEY
        for place in places:
            key = jax.random.fold_in(key, place)
        return jax.random.key_data(key)

    expected = (data(0), data(1), (data(2, 0), data(2, 1)))
    params, state = net.init(KEY, X)
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(net.apply(params, state, X, key=KEY, train=True)[1], expected)
    assert net.apply(params, state, X, train=False)[1] == state


def test_a_layer_used_many_times_is_traced_once():
    traces = []
    layer = plus(1.0, traces)
    net = fr.chain(*[layer] * 5)
    jax.jit(lambda x: net.apply(((),) * 5, ((),) * 5, x)[0])(X)
    assert traces == [X.shape]
    linen = fr.chain(*(fr.from_linen(nn.Dense(3)) for _ in range(3)))
    assert len({layer.apply for layer in linen.layers}) == 1


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3), (1, 2, 3)])
def test_a_partition_computes_what_all_layers_compute(cuts):
    layers = [fr.from_linen(nn.Dense(width)) for width in (3, 3, 2, 5)]
    whole = fr.chain(*layers)
    params, state = whole.init(KEY, X)
    stages = fr.partition(layers, cuts)
    bounds = (0, *cuts, 4)
    h = X
    for stage, start, stop in zip(stages, bounds, bounds[1:], strict=False):
        assert stage.layers == tuple(layers[start:stop])
        h, _ = stage.apply(params[start:stop], state[start:stop], h)
    np.testing.assert_allclose(h, whole.apply(params, state, X)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ((1, 2, 3), "K = 4 stages were asked of a network of 3 layers; K can be 1 to 3. Use a smaller K or a deeper"),
        ((0,), r"cuts \(0,\) leave stage 1 of 2 without layers; .*1 .. 2. Change the cuts, or let fr_jax.balance"),
        ((3,), "leave stage 2 of 2 without layers"),
        ((2, 2), "leave stage 2 of 3 without layers"),
        ((2, 1), "leave stage 2 of 3 without layers"),
        ((-1,), "leave stage 1 of 2 without layers"),
    ],
)
def test_cuts_that_leave_a_stage_empty_are_refused(cuts, said):
    with pytest.raises(ValueError, match=said):
        fr.partition([plus(1.0)] * 3, cuts)


def test_a_chain_can_be_copied_and_its_functions_replaced():
    layers = fr.chain(plus(1.0), plus(2.0))
    params, state = layers.init(KEY, X)
    expected = layers.apply(params, state, X)[0]
    again = [
        copy.deepcopy(layers),
        layers._replace(apply=lambda *args, **flags: layers.apply(*args, **flags)),
        *jax.tree.map(lambda function: function, (layers,)),
    ]
    assert [len(stage.layers) for stage in again] == [2, 2, 2]
    for stage in again:
        np.testing.assert_array_equal(stage.apply(params, state, X)[0], expected)


def test_what_is_no_stage_is_refused():
    with pytest.raises(ValueError, match=r"(?s)layer 2 is Dense\(.*from_linen"):
        fr.partition([plus(1.0), nn.Dense(3)], ())
    with pytest.raises(ValueError, match=r"layer 1 is \[.*fr_jax.chain\(\*layers\)"):
        fr.chain([plus(1.0)])
    with pytest.raises(ValueError, match="A class must be called first"):
        fr.from_linen(nn.Dense)
    with pytest.raises(ValueError, match=r"cuts \(1.9,\) must be whole numbers"):
        fr.partition([plus(1.0)] * 3, (1.9,))


def test_an_empty_chain_is_refused():
    with pytest.raises(ValueError, match=r"no stage; a stage needs at least one layer\. Pass one or more"):
        fr.chain()


@pytest.mark.usefixtures("x64")
def test_statistics_keep_the_type_that_init_made():
    norm = fr.from_linen(nn.BatchNorm())
    x = jnp.ones((4, 3), jnp.float64)
    params, state = norm.init(jax.random.key(0), x)
    _, moved = norm.apply(params, state, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, state)
