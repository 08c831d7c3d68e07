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
