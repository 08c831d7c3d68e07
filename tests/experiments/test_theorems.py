"""Theorems 1 and 2 with numbers, ``fr_jax.experiments.theorems``."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fr_jax.experiments.theorems import __main__ as theorems
from fr_jax.experiments.theorems.moments import Moments, exact, final_sigma, measure, stages_of, staleness
from fr_jax.experiments.theorems.problems import LAYERS, linear_problem, sine_problem

pytestmark = pytest.mark.usefixtures("x64")

QUICK = ["--K", "2", "--steps", "12", "--replicas", "16", "--batch-size", "2", "--rates", "0.1", "--diminishing"]
TWO_EXAMPLES = {"examples": 2, "part": 1}


def diminishing(steps: int, first: float = 0.3) -> np.ndarray:
    return first / (1 + np.arange(steps) / 3)


def literal_run(problem, K, rates, draws):
    """Algorithm 1 on the linear network, one replica: every past input and weight is kept, nothing else is clever.

    Its stages are linear in their weights, so the delta of mini-batch s at the output is the residual at w^s.
    """
    late = np.repeat(staleness(K), problem.start.shape[1])
    w = problem.start.reshape(-1)
    weights, directions = [w], []
    for t, rate in enumerate(rates):
        g = np.zeros_like(w)
        for i, lag in enumerate(late):
            if t >= lag:
                x, y = problem.inputs[draws[t - lag]], problem.targets[draws[t - lag]]
                g[i] = np.mean(x[:, i] * (x @ weights[t - lag] - y))
        w = w - rate * g
        weights.append(w)
        directions.append(g)
    return np.array(weights), np.array(directions)


def moments_of(problem, runs) -> Moments:
    x, y = problem.inputs, problem.targets
    w, g = (np.stack(arrays) for arrays in zip(*runs, strict=True))  # (runs, T + 1, d), (runs, T, d)
    residuals = w @ x.T - y
    full = residuals[:, :-1] @ x / len(y)
    each = ((residuals**2).mean(2) / 2 - problem.optimum, (full**2).sum(2), (full * g).sum(2), (g**2).sum(2))
    return Moments(*(one.mean(0) for one in each), np.full(len(g[0]), np.nan))


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_exact_expectations_equal_those_over_all_mini_batches(K):
    problem, rates = linear_problem(**TWO_EXAMPLES), diminishing(7)
    runs = [literal_run(problem, K, rates, np.array(draws)[:, None]) for draws in itertools.product((0, 1), repeat=7)]
    for found, expected in zip(exact(problem, K, rates, 1)[:4], moments_of(problem, runs)[:4], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_measured_expectations_are_the_exact_ones_up_to_their_noise(K):
    problem, rates = linear_problem(), np.full(25, 0.3)
    halves = measure(problem, K, rates, batch_size=4, replicas=4000, seed=1)
    known = exact(problem, K, rates, 4)
    for first, second, expected in zip(*halves, known, strict=True):
        if not np.isnan(expected).any():
            mean, spread = (first + second) / 2, np.abs(first - second).mean()  # of the order of the standard error
            np.testing.assert_allclose(mean, expected, atol=8 * spread + 1e-12)
    assert all(0 <= share <= 1 for half in halves for share in half.against)


@pytest.mark.parametrize("K", [1, 3, 4])
def test_without_chance_the_run_is_the_exact_one(K):
    problem, rates = linear_problem(examples=1, part=1, noise=0.0), diminishing(9)
    gram = problem.inputs.T @ problem.inputs  # of rank 1: exact() needs w*, which is not unique here
    assert np.linalg.matrix_rank(gram) == 1
    weights, directions = literal_run(problem, K, rates, np.zeros((9, 1), int))
    expected = moments_of(problem._replace(optimum=0.0), [(weights, directions)])
    found, _ = measure(problem._replace(optimum=0.0), K, rates, batch_size=1, replicas=2, seed=0)
    for one, other in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("make", [linear_problem, sine_problem])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_stages_are_the_network(make, K):
    problem, key = make(), jax.random.key(0)
    x = jnp.asarray(problem.inputs[:5])[:, None].repeat(2, axis=1)
    h, shift = x, iter(jnp.linspace(-1, 1, LAYERS))
    moved = []
    for stage in stages_of(problem, K, replicas=2):
        params, state = stage.init(key, h)
        params = jax.tree.map(lambda p: p + jnp.array([[0.0], [1.0]]) * next(shift), params)
        h, _ = stage.apply(params, state, h)
        moved += jax.tree.leaves(params)
    for replica in range(2):
        w = jnp.stack([p[replica] for p in moved])
        np.testing.assert_allclose(h[:, replica], problem.predict(w, jnp.asarray(problem.inputs[:5])), rtol=1e-12)


def test_every_replica_starts_from_w_0():
    problem, h, found = sine_problem(), jnp.zeros((1, 3, 4)), []
    for stage in stages_of(problem, 4, replicas=3):
        params, state = stage.init(jax.random.key(0), h)
        found += jax.tree.leaves(params)
        h, _ = stage.apply(params, state, h)
    starts = np.broadcast_to(problem.start[:, None], (LAYERS, 3, 4))
    np.testing.assert_array_equal(jnp.stack(found), starts)


def test_constants_of_the_linear_network():
    problem = linear_problem()
    hessian = jax.hessian(lambda w: problem.objective(w.reshape(LAYERS, -1)))(jnp.zeros(12))
    assert np.linalg.eigvalsh(hessian)[-1] == pytest.approx(problem.lipschitz) == pytest.approx(1.0)
    best = np.linalg.lstsq(problem.inputs, problem.targets)[0]
    assert float(problem.objective(jnp.asarray(best.reshape(LAYERS, -1)))) == pytest.approx(problem.optimum)


def test_constants_of_the_sine_network_bound_what_is_met():
    problem = sine_problem()
    N = len(problem.targets) // 2
    clean, noise = (problem.targets[:N] + problem.targets[N:]) / 2, (problem.targets[:N] - problem.targets[N:]) / 2
    hessian = jax.jit(jax.hessian(lambda w: problem.objective(w.reshape(LAYERS, -1))))
    for w in 3 * np.random.default_rng(0).standard_normal((50, LAYERS, 4)):
        assert np.abs(np.linalg.eigvalsh(hessian(jnp.asarray(w.reshape(-1))))).max() <= problem.lipschitz
        z = problem.predict(jnp.asarray(w), jnp.asarray(problem.inputs[:N]))
        above = np.mean((z - clean) ** 2) / 2
        assert float(problem.objective(jnp.asarray(w))) == pytest.approx(above + problem.optimum)
    np.testing.assert_allclose(noise, 0.3)
    eigenvalues = np.linalg.eigvalsh(hessian(jnp.asarray(problem.start.reshape(-1))))
    assert eigenvalues[0] < -0.1 < 0.1 < eigenvalues[-1]  # not convex
    met, _ = measure(problem, 4, np.full(30, 2.0), batch_size=1, replicas=16, seed=0)
    assert met.second.max() <= problem.second_moment


@pytest.mark.parametrize("make", [linear_problem, sine_problem])
def test_every_step_descends_as_a_lipschitz_gradient_makes_it(make):
    problem, rates = make(), diminishing(20, 1.0)
    for moments in measure(problem, 4, rates, batch_size=2, replicas=8, seed=3):
        bound = -rates * moments.inner + problem.lipschitz * rates**2 / 2 * moments.second
        assert np.all(np.diff(moments.excess) <= bound + 1e-12)


def test_one_stage_is_sgd_whose_sigma_is_1():
    problem, rates = linear_problem(), np.full(30, 0.2)
    known = exact(problem, 1, rates, 4)
    assert theorems.sigma_of(known, rates, 0, windows=False)[0] == pytest.approx(1.0)
    half, _ = measure(problem, 1, rates, batch_size=4, replicas=4, seed=0)
    np.testing.assert_array_equal(half.against, 0)


def test_sigma_at_the_end_of_a_run_with_small_steps():
    problem = linear_problem()
    assert final_sigma(problem, 1) == 1.0
    for K in (2, 4):
        known = exact(problem, K, np.full(1500, 0.05), 8)
        assert known.inner[-1] / known.gradient[-1] == pytest.approx(final_sigma(problem, K), rel=0.05)
    assert final_sigma(problem, 4) < final_sigma(problem, 2) < 0.7


def test_sides_are_equations_9_and_11():
    rng = np.random.default_rng(0)
    gradient, known = rng.uniform(1, 2, 6), theorems.Constants(lipschitz=3.0, second_moment=5.0, sigma=0.5, excess=7.0)
    left, right = theorems.sides(gradient, np.full(6, 0.1), known)
    for T in range(1, 7):
        assert left[T - 1] == pytest.approx(gradient[:T].mean())
        assert right[T - 1] == pytest.approx(7 / (0.5 * 0.1 * T) + 0.1 * 3 * 5 / (2 * 0.5))
    rates = diminishing(6)
    left, right = theorems.sides(gradient, rates, known)
    for T in range(1, 7):
        gamma = rates[:T].sum()
        assert left[T - 1] == pytest.approx((rates[:T] * gradient[:T]).sum() / gamma)
        assert right[T - 1] == pytest.approx(7 / (0.5 * gamma) + 3 * 5 * (rates[:T] ** 2).sum() / (2 * 0.5 * gamma))
    assert np.isnan(theorems.sides(gradient, rates, known._replace(sigma=-0.1))[1]).all()


def test_sigma_is_the_least_ratio_of_single_iterations_or_of_windows():
    moments = Moments(np.zeros(31), np.full(30, 2.0), np.linspace(2, -1, 30), np.zeros(30), np.zeros(30))
    sigma, at = theorems.sigma_of(moments, np.ones(30), 1, windows=False)
    assert (sigma, at) == (pytest.approx(-0.5), 29)
    sigma, at = theorems.sigma_of(moments, np.ones(30), 1, windows=True)
    assert at == 28 and sigma == pytest.approx(moments.inner[28:].sum() / 4)


def test_step_sizes_are_fixed_or_diminish():
    settings = theorems.TheoremsSettings(rates=(0.2,), diminishing=(0.5,), tau=2.0, steps=8)
    (kind, rate, fixed), (other_kind, first, falling) = theorems.schedules(settings)
    assert (kind, rate, other_kind, first) == ("fixed", 0.2, "diminishing", 0.5)
    np.testing.assert_array_equal(fixed, 0.2)
    np.testing.assert_allclose(falling[:3], [0.5, 0.5 / 1.5, 0.25])


def test_program_writes_curves_and_a_picture(tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    assert theorems.main([*QUICK, "--output", str(output)]) == 0
    assert (output / "theorems.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((output / "theorems.json").read_text())["rows"]
    assert [(row["problem"], row["K"], row["schedule"]) for row in rows] == [
        ("linear", 2, "fixed"),
        ("sine", 2, "fixed"),
    ]
    for row in rows:
        assert row["holds"] and row["descent"] <= 0.05 and row["start"] == 1
        assert len(row["curves"]["left"]) == len(row["curves"]["right"]) == len(row["curves"]["T"])
        assert row["curves"]["T"][-1] == 11
    assert "proved" in rows[1]["curves"] and rows[1]["proved_second_moment"] > rows[1]["second_moment"]
    assert ["linear", "fixed", "2", "0.1"] in [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert theorems.main([*QUICK, "--output", str(output)]) == 2
    assert (
        "has theorems.json, theorems.png already. Add --overwrite, or choose another --output."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--K", "5"], "--K 5 is out of range; each must be at least 1 and at most 4"),
        (["--rates", "0"], "--rates 0.0 is out of range; each must be above 0"),
        (["--replicas", "3"], "--replicas 3 must be even"),
        (["--steps", "2"], "--steps 2 is out of range; it must be at least 8"),
        (["--tau", "-1"], "--tau -1.0 is out of range; it must be above 0"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--seed", str(2**32)], "at least 0 and at most 4294967295"),
    ],
)
def test_bad_settings_end_with_2(arguments, message, capsys):
    assert theorems.main(arguments) == 2
    assert message in capsys.readouterr().err
