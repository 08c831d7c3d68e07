import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr
from fr_jax.partitioning import costs as costs_module
from fr_jax.partitioning.costs import LayerCost, StageWork, stage_cost

B, SIZES = 16, (32, 64, 48, 10)


def dense(*sizes):
    return [fr.from_linen(nn.Dense(size)) for size in sizes]


def test_flops_of_dense_layers_are_the_analytic_count():
    costs = fr.layer_costs(dense(*SIZES[1:]), jax.ShapeDtypeStruct((B, SIZES[0]), jnp.float32))
    # Forward, gradient of the weights, gradient of the input: three products, multiply and add.
    expected = [3 * 2 * B * n_in * n_out for n_in, n_out in itertools.pairwise(SIZES)]
    np.testing.assert_allclose(costs, expected, rtol=0.08)
    whole = fr.layer_costs([fr.chain(*dense(*SIZES[1:]))], np.zeros((B, SIZES[0])))
    assert whole == pytest.approx([sum(costs)], rel=0.02)


def test_flops_of_each_pass_are_one_two_and_three_products():
    for cost, (n_in, n_out) in zip(
        fr.layer_flops(dense(*SIZES[1:]), jnp.zeros((B, SIZES[0]))), itertools.pairwise(SIZES), strict=True
    ):
        product = 2 * B * n_in * n_out
        np.testing.assert_allclose(cost, (product, 2 * product, 3 * product), rtol=0.06)
        assert cost.input_gradient == pytest.approx(2 * product, rel=0.06)


@pytest.mark.parametrize("cuts", [(1,), (2,)])
def test_costs_of_stages_are_those_of_the_functions_that_they_run(cuts):
    """The sum over layers against XLA's count of the whole stage: play and replay, the first without input gradient."""
    layers, x = fr.models.mlp(depth=3, width=64), jnp.zeros((B, SIZES[0]))
    costs, (first, _) = fr.layer_flops(layers, x), fr.partition(layers, cuts)
    params, state = first.init(jax.random.key(0), x)

    def flops(run, *arguments):
        return jax.jit(run).lower(*arguments).cost_analysis()["flops"]

    def play(params):
        return first.apply(params, state, x)[0]

    def replay(params, delta):
        return jax.vjp(play, params)[1](delta)

    expected = flops(play, params) + flops(replay, params, play(params))
    assert stage_cost(costs, StageWork(plays=1), 0, cuts[0]) == pytest.approx(expected, rel=0.08)


def product(params, x):
    return jnp.tanh(x @ params)


def looped(steps, loop):
    """``steps`` products of ``(B, 8)`` and ``(8, 8)``, one after the other."""
    apply = lambda params, state, x, *, key=None, train=True: (loop(steps, params, x), state)
    return fr.Stage(lambda key, x: (jnp.ones((8, 8)), ()), apply)


LOOPS = {
    "python": lambda n, w, x: functools.reduce(lambda h, _: product(w, h), range(n), x),
    "scan": lambda n, w, x: jax.lax.scan(lambda h, _: (product(w, h), None), x, length=n)[0],
    "unrolled": lambda n, w, x: jax.lax.scan(lambda h, _: (product(w, h), None), x, length=n, unroll=4)[0],
    "fori": lambda n, w, x: jax.lax.fori_loop(0, n, lambda _, h: product(w, h), x),
    "nested": lambda n, w, x: jax.lax.scan(lambda h, _: (LOOPS["scan"](n // 2, w, h), None), x, length=2)[0],
    "in a branch": lambda n, w, x: jax.lax.cond(
        w[0, 0] > 0, functools.partial(LOOPS["scan"], n, w), functools.partial(LOOPS["scan"], 1, w), x
    ),
    "called": lambda n, w, x: jax.jit(jax.checkpoint(functools.partial(LOOPS["scan"], n)))(w, x),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_all_iterations_of_a_loop_count(loop):
    (cost,) = fr.layer_flops([looped(10, LOOPS[loop])], jnp.zeros((B, 8)))
    products = 10 * 2 * B * 8 * 8
    np.testing.assert_allclose(cost.forward, products, rtol=0.01 if loop != "in a branch" else 0.2)
    assert 2.9 * products < cost.both_gradients < (3.4 if loop != "called" else 4.4) * products


@pytest.mark.slow
def test_a_recurrent_network_costs_its_time_steps():
    layer = fr.from_linen(nn.RNN(nn.LSTMCell(32)))
    few, many = (fr.layer_flops([layer], jnp.ones((8, T, 16)))[0] for T in (4, 256))
    np.testing.assert_allclose(many, 64 * np.array(few), rtol=1e-3)


def test_a_loop_of_unknown_length_counts_once_and_warns():
    until = lambda n, w, x: jax.lax.while_loop(lambda h: h.sum() < n, functools.partial(product, w), x)
    stage = looped(10, lambda n, w, x: jax.lax.stop_gradient(until(n, w, x)) + product(w, x))
    with pytest.warns(UserWarning, match=r"a loop whose number of iterations is not known before it runs .*lax\.scan"):
        (cost,) = fr.layer_flops([stage], jnp.zeros((B, 8)))
    assert 2 * 2 * B * 8 * 8 < cost.forward < 3 * 2 * B * 8 * 8


def test_cost_of_a_stage_by_hand():
    costs = [LayerCost(1.0, 3.0, 4.0), LayerCost(10.0, 30.0, 50.0), LayerCost(100.0, 200.0, 300.0)]
    assert stage_cost(costs, StageWork(), 0, 3) == 3 + 50 + 300
    assert stage_cost(costs, StageWork(plays=2), 0, 2) == 2 * 11 + 3 + 50
    assert stage_cost(costs, StageWork(input_passes=2), 1, 3) == 350 + 2 * (30 + 200)
    assert stage_cost(costs, StageWork(plays=1, passes=0), 1, 1) == 0
    assert LayerCost(1.0, 3.0, 2.0).input_gradient == 1.0  # noise makes no negative times


def test_integer_inputs_have_no_gradient():
    layers = [fr.from_linen(nn.Embed(11, 8)), fr.from_linen(nn.Dense(4))]
    first, second = fr.layer_flops(layers, np.zeros((2, 5), np.int32))
    assert first.weights_gradient == first.both_gradients and second.both_gradients > second.weights_gradient
    assert len(fr.layer_times(layers, np.zeros((2, 5), np.int32), repeats=1)) == 2


def test_seconds_are_positive_and_follow_the_size():
    times = fr.layer_times(dense(1024, 1024, 8), jnp.zeros((128, 8)), repeats=3, device=jax.devices()[1])
    assert min(min(cost) for cost in times) > 0
    assert times[1].both_gradients > times[1].forward and times[1].both_gradients > 3 * times[2].both_gradients
    assert fr.layer_costs(dense(4), jnp.zeros((2, 8)), measure="time", repeats=1)[0] > 0


def test_equal_layers_are_counted_once_and_timed_in_turns(monkeypatch):
    made, ran = itertools.count(), []

    def ready(run, specs, seed):
        number = next(made)
        return lambda: ran.append(number) or float(number)

    monkeypatch.setattr(costs_module, "_ready", ready)
    times = fr.layer_times(dense(4, 4, 4, 3, 4, 3), jnp.zeros((2, 4)), repeats=2)
    assert times == [(0, 1, 2)] * 3 + [(3, 4, 5), (6, 7, 8), (3, 4, 5)]
    assert ran == 2 * [*range(9)]
    calls = itertools.count(1)
    monkeypatch.setattr(costs_module, "_count_flops", lambda *args: float(next(calls)))
    assert fr.layer_costs(dense(4, 4, 4, 3, 4, 3), jnp.zeros((2, 4))) == [3.0, 3.0, 3.0, 6.0, 9.0, 6.0]


@pytest.mark.parametrize(
    ("layers", "measure", "repeats", "said"),
    [
        (1, "bytes", 1, "'bytes' is unknown; it can be 'flops' or 'time'"),
        (0, "flops", 1, "at least one"),
        (1, "time", 0, "repeats = 0 is too few"),
    ],
)
def test_bad_measurements_are_refused(layers, measure, repeats, said):
    with pytest.raises(ValueError, match=said):
        fr.layer_costs(dense(2) * layers, jnp.zeros((2, 2)), measure, repeats=repeats)


def test_says_what_to_do_where_operations_cannot_be_counted(monkeypatch):
    def local_devices(*, backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cuda,cpu"):
        fr.layer_costs(fr.models.mlp(depth=2, width=8), jnp.ones((2, 12)))
