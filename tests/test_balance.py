import importlib
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fr_jax as fr


def slowest(costs, cuts, last_stage_weight):
    bounds = (0, *cuts, len(costs))
    sums = [sum(costs[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]
    return max([*sums[:-1], last_stage_weight * sums[-1]])


@pytest.mark.parametrize("weight", [1.0, 0.75])
@pytest.mark.parametrize("L", [1, 2, 5, 9])
def test_cuts_are_the_best_of_all(L, weight):
    rng = np.random.default_rng(L)
    for K in range(1, min(L, 5) + 1):
        for costs in (*rng.uniform(0, 10, (5, L)), rng.integers(0, 4, L), np.zeros(L), np.eye(L)[-1]):
            cuts = fr.balance(list(costs), K, last_stage_weight=weight)
            assert len(fr.partition([fr.chain] * L, cuts)) == K  # increasing, within the list
            best = min(slowest(costs, c, weight) for c in itertools.combinations(range(1, L), K - 1))
            assert slowest(costs, cuts, weight) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_a_lighter_last_stage_gets_more_layers():
    assert fr.balance([1.0] * 7, 2, last_stage_weight=0.75) == (3,)
    assert fr.balance([1.0] * 15, 4, last_stage_weight=0.75)[-1] < fr.balance([1.0] * 15, 4)[-1]


@pytest.mark.parametrize(
    ("costs", "K", "said"),
    [
        ([1.0, 1.0], 3, "K = 3 stages were asked of 2 layers; K can be 1 to 2. Use a smaller K or more layers"),
        ([1.0, 1.0], 0, "K = 0 .*K can be 1 to 2"),
        ([1.0, -1.0], 2, r"at least 0; given were \[1.0, -1.0\]"),
        ([1.0, float("nan")], 2, "finite"),
        ([1.0, float("inf")], 2, "finite"),
    ],
)
def test_impossible_requests_are_refused(costs, K, said):
    with pytest.raises(ValueError, match=said):
        fr.balance(costs, K)


def test_flops_of_dense_layers_are_the_analytic_count():
    B, sizes = 16, (32, 64, 48, 10)
    layers = [fr.from_linen(nn.Dense(size)) for size in sizes[1:]]
    costs = fr.layer_costs(layers, jax.ShapeDtypeStruct((B, sizes[0]), jnp.float32))
    # Forward, gradient of the weights, gradient of the input: three products, multiply and add.
    expected = [3 * 2 * B * n_in * n_out for n_in, n_out in itertools.pairwise(sizes)]
    np.testing.assert_allclose(costs, expected, rtol=0.08)
    assert fr.layer_costs([fr.chain(*layers)], np.zeros((B, sizes[0]))) == pytest.approx([sum(costs)], rel=0.02)


def test_integer_inputs_have_no_gradient():
    costs = fr.layer_costs([fr.from_linen(nn.Embed(11, 8)), fr.from_linen(nn.Dense(4))], np.zeros((2, 5), np.int32))
    assert len(costs) == 2 and costs[1] > 0


def test_seconds_are_positive_and_follow_the_size():
    layers = [fr.from_linen(nn.Dense(size)) for size in (1024, 1024, 8)]
    costs = fr.layer_costs(layers, jnp.zeros((128, 8)), measure="time", repeats=3)
    assert min(costs) > 0 and costs[1] > 3 * costs[2]


@pytest.mark.parametrize("measure", ["flops", "time"])
def test_equal_layers_are_measured_once(monkeypatch, measure):
    name = {"flops": "_count_flops", "time": "_measure_seconds"}[measure]
    calls = itertools.count(1)
    module = importlib.import_module("fr_jax.balance")  # fr_jax.balance itself is the function
    monkeypatch.setattr(module, name, lambda *args, **kwargs: float(next(calls)))
    layers = [fr.from_linen(nn.Dense(size)) for size in (4, 4, 4, 3, 4, 3)]
    assert fr.layer_costs(layers, jnp.zeros((2, 4)), measure) == [1.0, 1.0, 1.0, 2.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("layers", "measure", "said"),
    [(1, "bytes", "'bytes' is unknown; it can be 'flops' or 'time'"), (0, "flops", "at least one")],
)
def test_bad_measurements_are_refused(layers, measure, said):
    with pytest.raises(ValueError, match=said):
        fr.layer_costs([fr.from_linen(nn.Dense(2))] * layers, jnp.zeros((2, 2)), measure)
