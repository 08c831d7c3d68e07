"""The cards of the methods, against the simulated schedules and the tables of ``algorithms.md``."""

import inspect
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest

import fr_jax as fr
from fr_jax.diagnostics.simulation.timeline import simulate, summarise
from fr_jax.diagnostics.simulation.times import balanced_shares, times_of_costs
from fr_jax.experiments._methods import METHODS, REFERENCES, Method, TrainingSet, listed

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
    assert [METHODS["dfa"].speedup(K, {}) for K in (1, 2, 4)] == [1, 1.5, 2]
    assert [METHODS["proxprop"].speedup(K, {"cg_steps": 3}) for K in (1, 2)] == [1 / 3, 1 / 3]
    assert METHODS["eqprop"].speedup(1, {}) is None


def test_work_of_the_last_stage():
    weights = {name: card.last_stage_weight(4, own_of(card)) for name, card in METHODS.items() if card.schedule}
    assert weights == {"fr": 3 / 4, "bp": 1, "ddg": 1, "dni": 1, "gpipe": 1, "2bw": 1}


@pytest.mark.parametrize(
    ("method", "factory", "given", "expected"),
    [
        ("bp", "backprop", {"microbatches": 4}, {"microbatches": 4}),
        ("fr", "features_replay", {"microbatches": 4, "replay_weights": "stashed"}, {"replay_weights": "stashed"}),
        ("fr", "features_replay", {"discrepancy_decay": 0.5}, {"discrepancy_decay": 0.5, "microbatches": 1}),
        ("ddg", "ddg", {"weight_prediction": 1.0, "prediction_momentum": 0.9}, {"prediction_momentum": 0.9}),
        ("gpipe", "gpipe", {"pipeline_schedule": "1f1b"}, {"schedule": "1f1b", "microbatches": 4}),
        ("2bw", "pipedream_2bw", {}, {"microbatches": 8}),
        ("dfa", "direct_feedback_alignment", {}, {"placement": None}),
        ("mac", "auxiliary_coordinates", {"z_steps": 7}, {"z_steps": 7, "cache_size": None}),
        ("admm", "admm", {"beta": 2.0}, {"layer_sizes": (3, 2, 10), "beta": 2.0, "gamma": 10.0, "warm_start": 10}),
        ("eqprop", "equilibrium_propagation", {}, {"layer_sizes": (3, 2, 10), "centred": True, "beta": 0.5}),
        ("eqprop", "equilibrium_propagation", {"one_sided": True, "relaxation_step": 1.0}, {"centred": False}),
        ("proxprop", "proximal_backprop", {"cg_steps": 5}, {"cg_steps": 5, "proximal_step": 1.0}),
    ],
)
def test_own_settings_reach_the_method(monkeypatch, method, factory, given, expected):
    """All arguments are the method's; those that are not given have their defaults."""
    accepted = inspect.signature(getattr(fr, factory))
    taken = []
    monkeypatch.setattr(fr, factory, lambda *args, **own: taken.append(accepted.bind(*args, **own).arguments))
    card, data = METHODS[method], TrainingSet(examples=100, classes=10, values=3)
    stages = fr.partition(fr.models.mlp(depth=2, width=2), () if card.whole else (1,))
    card.make(card.defaults | given, stages, None, optax.sgd(1.0), data, placement=None)
    assert expected.items() <= taken[0].items()


def test_rescheduling_counts_micro_batches_and_mini_batches_for_one_update(monkeypatch):
    """Stage 1 of 5 is 4 / (M m) updates late."""
    monkeypatch.setattr(fr, "features_replay", lambda stages, loss_fn, optimizer, **own: optimizer)
    card, stages = METHODS["fr"], fr.partition(fr.models.mlp(depth=5, width=2), (1, 2, 3, 4))
    for own, size in (({}, 1 / 4), ({"microbatches": 2}, 1 / 2), ({"microbatches": 2, "accumulate": 2}, 1.0)):
        own = card.defaults | {"rescheduling": 10} | own
        first, *_ = card.make(own, stages, None, optax.sgd(1.0), None)
        state = first.init(jnp.ones(()))
        for _ in range(own["accumulate"]):
            update, state = first.update(jnp.ones(()), state)
        assert float(update) == pytest.approx(-size), own


MADE_UP = """
import json, sys
import fr_jax as fr
from fr_jax.experiments._fields import own_setting
from fr_jax.experiments._methods import METHODS, Method

METHODS["ours"] = Method(
    short="Ours",
    title="our method",
    make=lambda own, stages, loss_fn, optimizer, data, **common: fr.backprop(stages, loss_fn, optimizer, **common),
    learning_rate=0.25,
    own={own_setting("strength", float, "How much of it.", above=0): 1.5},
)
from fr_jax.experiments import mnist  # settings are assembled from the cards when they are first imported

tiny = ["--method", "ours", "--dataset", "digits", "--depth", "2", "--width", "4", "--K", "2", "--batch-size", "512"]
tiny += ["--checkpoint-every", "1", "--workdir", sys.argv[1]]
for words in (["--steps", "1", "--strength", "0"], ["--steps", "1"], ["--steps", "2", "--resume"]):
    print("CODE", mnist.main([*tiny, *words, "--milestones", "9"]))
print("CODE", mnist.main([*tiny, "--steps", "3", "--resume", "--milestones", "9", "--strength", "2"]))
config = json.load(open(sys.argv[1] + "/config.json"))
print(config["strength"], config["learning_rate"])
mnist.main(["--help"])
"""


def test_a_card_is_all_that_a_program_needs_of_a_new_method(tmp_path, program_env):
    """It is checked, resolved, trained, resumed, and in the help."""
    command = [sys.executable, "-c", MADE_UP, str(tmp_path / "run")]
    done = subprocess.run(command, env=program_env, capture_output=True, text=True, timeout=200)
    said = " ".join(done.stdout.replace("│", " ").split())
    assert [text[0] for text in done.stdout.split("CODE ")[1:]] == ["2", "0", "0", "2"], done.stderr
    assert "--strength 0.0 is out of range; it must be above 0." in done.stderr
    assert "--strength is 2.0 and was 1.5" in done.stderr
    assert "mlp, our method, K = 2" in said and "Resuming after step 1 of 2" in said
    assert "1.5 0.05" in said  # a fifth of the card's learning rate: no batch normalisation
    assert "[ours] How much of it. Default: 1.5." in said and "0.25 for ours" in said
    assert "admm or ours (our method)" in said


def test_titles():
    assert listed() == (
        "fr (features replay), bp (back-propagation), ddg, dni, blockprop, gpipe, 2bw (PipeDream-2BW), dfa (direct "
        "feedback alignment), proxprop (proximal back-propagation), mac, eqprop (equilibrium propagation) or admm"
    )
    assert METHODS["gpipe"].titled({"microbatches": 4}, ", K = 2") == "GPipe, K = 2, M = 4"
