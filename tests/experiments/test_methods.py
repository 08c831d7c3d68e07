"""The cards of the methods, against the simulated schedules and the tables of ``algorithms.md``."""

import pytest

from fr_jax.diagnostics.simulation.timeline import simulate, summarise
from fr_jax.diagnostics.simulation.times import balanced_shares, times_of_costs
from fr_jax.experiments._methods import METHODS, REFERENCES, Method, listed

CARDS = {**METHODS, **REFERENCES}


def own_of(card, **changes):
    return (card.defaults if isinstance(card, Method) else {}) | changes


@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.schedule is not None])
def test_the_bound_is_what_an_ideal_network_reaches(name, K):
    card, own = CARDS[name], own_of(CARDS[name])
    shares = balanced_shares(K, last_stage_weight=card.last_stage_weight(K, own))
    M = own.get("microbatches", 1)
    times = times_of_costs([3 * share / M for share in shares], synthesizers=[0.0] * (K - 1))
    step = summarise(simulate(card.schedule(times, 12 * K, M)), 8 * K).step_seconds
    assert 3 / step == pytest.approx(card.speedup(K, own))


def test_bounds_are_the_closed_forms():
    assert [METHODS["fr"].speedup(K, {}) for K in (1, 2, 4, 8)] == [1, 1.75, 3.25, 6.25]
    gpipe = METHODS["gpipe"]
    assert [gpipe.speedup(K, own_of(gpipe, microbatches=M)) for K, M in ((1, 3), (4, 1), (4, 4))] == [1, 1, 16 / 7]
    assert METHODS["dni"].speedup(1, {}) == METHODS["blockprop"].speedup(1, {}) == 1
    assert METHODS["blockprop"].speedup(2, {}) is None


def test_work_of_the_last_stage():
    weights = {name: card.last_stage_weight(4, own_of(card)) for name, card in METHODS.items() if card.schedule}
    assert weights == {"fr": 3 / 4, "bp": 1, "ddg": 1, "dni": 1, "gpipe": 1}


def test_titles():
    assert listed() == "fr (features replay), bp (back-propagation), ddg, dni, blockprop or gpipe"
    assert METHODS["gpipe"].titled({"microbatches": 4}, ", K = 2") == "GPipe, K = 2, M = 4"
