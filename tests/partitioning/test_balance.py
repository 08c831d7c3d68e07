import itertools

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
            assert len(fr.partition([fr.Stage(None, None)] * L, cuts)) == K  # increasing, within the list
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


def naive(stage_cost, L, K):
    def slowest_of(cuts):
        bounds = (0, *cuts, L)
        return max(stage_cost(k, bounds[k], bounds[k + 1]) for k in range(K))

    return slowest_of, min(slowest_of(cuts) for cuts in itertools.combinations(range(1, L), K - 1))


@pytest.mark.parametrize("L", [1, 2, 5, 8])
def test_cuts_of_arbitrary_stages_are_the_best_of_all(L):
    rng = np.random.default_rng(L)
    for K in range(1, min(L, 4) + 1):
        table = rng.uniform(0, 10, (K, L + 1, L + 1))
        stage_cost = lambda *where, table=table: table[where]
        slowest_of, best = naive(stage_cost, L, K)
        assert slowest_of(fr.balance_stages(stage_cost, L, K)) == best


def test_only_possible_stages_are_asked_for():
    asked = []

    def stage_cost(k, start, stop):
        asked.append((k, start, stop))
        return 1.0

    fr.balance_stages(stage_cost, 6, 3)
    assert all(start >= k and start < stop <= 6 - (2 - k) for k, start, stop in asked)
    assert all((start == 0) == (k == 0) and (stop == 6 or k < 2) for k, start, stop in asked)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_impossible_stage_costs_are_refused(cost):
    with pytest.raises(ValueError, match="finite and at least 0"):
        fr.balance_stages(lambda k, start, stop: cost, 3, 2)
    with pytest.raises(ValueError, match="K = 4 stages were asked of 3 layers"):
        fr.balance_stages(lambda k, start, stop: 1.0, 3, 4)
