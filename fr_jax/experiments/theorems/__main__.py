"""Theorems 1 and 2 of the features replay paper with numbers: ``python -m fr_jax.experiments.theorems``.

With L, M, sigma of Assumptions 1 and 2, and gamma_t = gamma (Theorem 1) or diminishing (Theorem 2):

    sum_t gamma_t E||grad f(w^t)||^2 / Gamma_T  <=  (f(w^0) - f(w*)) / (sigma Gamma_T)
                                                    + L M sum_t gamma_t^2 / (2 sigma Gamma_T)       (9), (11)

for t = 0..T-1 and Gamma_T = sum_t gamma_t. Here features replay trains two least-squares networks whose L and f(w*)
are known (``problems``), and both sides are drawn over T. Both sums begin with t = K-1, the first iteration in which
all stages update, and with w^{K-1} instead of w^0.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.harness import one_process
from fr_jax.experiments._cli.machine import machine, settings_of
from fr_jax.experiments._cli.results import check_folder, write_results
from fr_jax.experiments._cli.tables import text_table
from fr_jax.experiments._fields import LARGEST_SEED, SettingsError, check_fields, setting
from fr_jax.experiments.theorems.moments import Moments, exact, final_sigma, measure
from fr_jax.experiments.theorems.picture import figure
from fr_jax.experiments.theorems.problems import LAYERS, PROBLEMS, Problem
from fr_jax.plotting.style import png

__all__ = ["TheoremsSettings", "constants", "main", "sides", "table"]

FILES = ("theorems.json", "theorems.png")
POINTS = 60


@dataclasses.dataclass(frozen=True)
class TheoremsSettings:
    """Measure the left side of Theorems 1 and 2 on networks with known constants, beside the bound."""

    problems: tuple[Literal["linear", "sine"], ...] = setting(("linear", "sine"), series="distinct")
    """linear: a residual network that is linear in all weights. sine: one that is not convex."""
    K: tuple[int, ...] = setting((2, 4), least=1, most=LAYERS, series="distinct")
    """Numbers of stages, 1 to 4: the networks have four layers."""
    rates: tuple[float, ...] = setting((0.02, 0.1, 0.4), above=0)
    """Fixed step sizes gamma (Theorem 1)."""
    diminishing: tuple[float, ...] = setting((0.4,), above=0)
    """gamma_0 of diminishing step sizes gamma_0 / (1 + t / tau) (Theorem 2)."""
    tau: float = setting(100.0, above=0)
    """Iterations after which a diminishing step size is halved."""
    steps: int = setting(4000, least=2 * LAYERS)
    """Iterations T of a run."""
    batch_size: int = setting(8, least=1)
    """Examples of a mini-batch, drawn with replacement."""
    replicas: int = setting(512, least=2)
    """Independent runs, side by side, over which expectations are means; an even number."""
    seed: int = setting(0, least=0, most=LARGEST_SEED)
    """Of the mini-batches. The problems themselves are fixed."""
    output: Path | None = None
    """A folder for theorems.json and theorems.png; without it only the table is printed."""
    overwrite: bool = False
    """Replace these files where they exist."""


def check(settings: TheoremsSettings) -> None:
    """Raises SettingsError for the first setting that cannot be used."""
    check_fields(settings)
    if not (settings.rates or settings.diminishing):
        raise SettingsError("--rates and --diminishing are both empty; give one step size or more.")
    if settings.replicas % 2:
        raise SettingsError(f"--replicas {settings.replicas} must be even: either half has a use of its own.")
    one_process("theorems runs in one process.")
    check_folder(settings.output, FILES, overwrite=settings.overwrite)


class Constants(NamedTuple):
    """What the right side needs: L, M, sigma, and the excess of f at the first iteration that counts."""

    lipschitz: float
    second_moment: float
    sigma: float
    excess: float


def sigma_of(moments: Moments, rates: np.ndarray, start: int, *, windows: bool) -> tuple[float, int]:
    """The largest sigma of Assumption 1 in expectation, and the iteration that decides it.

    E<grad f(w^t), g^t> >= sigma E||grad f(w^t)||^2 for t from ``start`` on. With ``windows`` the sums over windows
    t .. 1.1 t take the place of single iterations, each with its gamma_t: sampled means are too noisy for a minimum of
    thousands, and the proofs sum over t anyway.
    """
    edges = [start]
    while edges[-1] < len(rates):
        edges.append(edges[-1] + (max(1, edges[-1] // 10) if windows else 1))
    sums = [np.add.reduceat(rates * values, edges[:-1]) for values in (moments.inner, moments.gradient)]
    ratios = sums[0] / sums[1]
    lowest = int(np.argmin(ratios))
    return float(ratios[lowest]), edges[lowest]


def constants(problem: Problem, moments: Moments, rates: np.ndarray, start: int, *, windows: bool) -> Constants:
    """L of the problem; M and sigma, the extremes along the run from iteration ``start`` on."""
    sigma, _ = sigma_of(moments, rates, start, windows=windows)
    return Constants(problem.lipschitz, float(moments.second[start:].max()), sigma, float(moments.excess[start]))


def sides(
    gradient: np.ndarray, rates: np.ndarray, known: Constants, second: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Left and right side of (11) for T = 1, 2, ..; with equal rates that is (9).

    Args:
      gradient: ``(T,)``, E||grad f(w^t)||^2.
      rates: ``(T,)``, gamma_t.
      known: the constants.
      second: ``(T,)``, E||g^t||^2 to take each iteration's own instead of their bound M.

    Returns:
      ``(T,)`` each; the right side is NaN where sigma is not positive: Assumption 1 does not hold.
    """
    total = np.cumsum(rates)
    left = np.cumsum(rates * gradient) / total
    noise = np.cumsum(np.square(rates) * (known.second_moment if second is None else second))
    sigma = known.sigma if known.sigma > 0 else np.nan
    return left, (known.excess + known.lipschitz * noise / 2) / (sigma * total)


def schedules(settings: TheoremsSettings) -> list[tuple[str, float, np.ndarray]]:
    """``(kind, gamma or gamma_0, (T,) gamma_t)`` of every step size; the diminishing ones satisfy (10)."""
    slower = 1 + np.arange(settings.steps) / settings.tau
    fixed = [("fixed", rate, np.full(settings.steps, rate)) for rate in settings.rates]
    return fixed + [("diminishing", rate, rate / slower) for rate in settings.diminishing]


def measure_all(settings: TheoremsSettings) -> dict[str, Any]:
    """Every problem, K and step size.

    Returns:
      Settings, machine, date and versions, and under ``"rows"`` one entry per run: see :func:`describe`.
    """
    runs = [(name, K, *one) for name in settings.problems for K in settings.K for one in schedules(settings)]
    rows = []
    seldom = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file is not a screen
    bar = tqdm(total=len(runs) * settings.steps, unit="step", dynamic_ncols=True, mininterval=seldom)
    with jax.enable_x64(True), bar:
        for name, K, kind, rate, rates in runs:
            bar.set_postfix_str(f"{name}, K = {K}, gamma = {rate:g}, {kind}", refresh=False)
            problem = PROBLEMS[name]()
            size = {"batch_size": settings.batch_size, "replicas": settings.replicas, "seed": settings.seed}
            halves = measure(problem, K, rates, **size, advanced=bar.update)
            known = exact(problem, K, rates, settings.batch_size) if name == "linear" else None
            row = {"problem": name, "K": K, "schedule": kind, "rate": rate}
            rows.append(row | describe(problem, K, rates, halves, known))
    return {
        "settings": settings_of(settings),
        **machine(),
        "rows": rows,
    }


def describe(
    problem: Problem, K: int, rates: np.ndarray, halves: tuple[Moments, Moments], known: Moments | None
) -> dict[str, Any]:
    """What a run comes to.

    Sigma and M are those of ``known``, the exact expectations; without them those of the first half of the replicas.
    The left side is measured: over all replicas, or over the second half.

    Returns:
      The constants; ``sigma_from_0``, sigma if the iterations before K-1 counted too; ``sigma_at``, the iteration that
      decides it; ``sigma_at_end``, the ratio over the last eighth of the run; ``final_sigma``, what it should be for
      the linear network and a small step (:func:`~fr_jax.experiments.theorems.moments.final_sigma`);
      ``proved_second_moment``; ``holds``, whether left <= right for all T; ``ratio``, right / left at the last T;
      ``descent``, the largest violation of Lemma 1's inequality (13) in expectation over all t (negative: it holds);
      ``against``, the share of replicas and iterations in the second half of the run whose step, given the past, is
      expected to climb; ``left_error``, the largest relative deviation of the measured left side from the exact one;
      ``halves_differ``, that of the halves' mean of E||grad f||^2; and the ``curves`` over T (left, right, with each
      iteration's own E||g||^2, with the proved M) and over t.
    """
    # Extremes of sampled means are biased by their noise: they are taken from one half of the replicas, and the left
    # side from the other.
    start, windows = K - 1, known is None
    source = halves[0] if known is None else known
    measured = halves[1] if known is None else Moments(*(np.mean(pair, axis=0) for pair in zip(*halves, strict=True)))
    given = constants(problem, source, rates, start, windows=windows)
    sigma_0, _ = sigma_of(source, rates, 0, windows=windows)
    _, at = sigma_of(source, rates, start, windows=windows)
    late = slice(start, None)
    left, right = sides(measured.gradient[late], rates[late], given)
    _, own = sides(measured.gradient[late], rates[late], given, source.second[late])
    proved = given._replace(second_moment=problem.second_moment or np.nan)
    curves = {"left": left, "right": right, "own_second_moment": own}
    if problem.second_moment is not None:
        curves["proved"] = sides(measured.gradient[late], rates[late], proved)[1]
    if known is not None:
        curves["left_exact"] = sides(known.gradient[late], rates[late], given)[0]
    # (13): E f(w^{t+1}) - E f(w^t) <= -sigma gamma_t E||grad f(w^t)||^2 + gamma_t^2 L M / 2.
    change = np.diff(measured.excess)[late]
    bound = -given.sigma * rates * measured.gradient + np.square(rates) * given.lipschitz * given.second_moment / 2
    end = slice(-(len(rates) // 8), None)
    kept = np.unique(np.geomspace(1, len(left), POINTS).round().astype(int)) - 1
    at_t = {name: getattr(source, name)[late][kept] for name in ("gradient", "inner", "second")}
    against = np.mean([half.against for half in halves], axis=0)[late]
    # Means from each kept iteration up to the next: the share in a single iteration is noisy.
    at_t["against"] = np.add.reduceat(against, kept) / np.diff([*kept, len(against)])
    return {
        **given._asdict(),
        "optimum": problem.optimum,
        "start": start,
        "sigma_at": at,
        "sigma_from_0": sigma_0,
        "sigma_at_end": float(source.inner[end].sum() / source.gradient[end].sum()),
        "final_sigma": final_sigma(problem, K) if known is not None else None,
        "proved_second_moment": problem.second_moment,
        "holds": bool(np.all(left <= right)),
        "ratio": float(right[-1] / left[-1]),
        "ratio_own_second_moment": float(own[-1] / left[-1]),
        "descent": float((change - bound[late]).max()),
        "against": float(against[len(rates) // 2 :].mean()),
        "left_error": float(np.abs(left / curves["left_exact"] - 1).max()) if known is not None else None,
        "halves_differ": float(abs(halves[0].gradient[late].mean() / halves[1].gradient[late].mean() - 1)),
        "curves": {"T": kept + 1, **{name: _rounded(values[kept]) for name, values in curves.items()}},
        "over_t": {"t": kept + start, **{name: _rounded(values) for name, values in at_t.items()}},
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = ("problem", "schedule", "K", "gamma", "sigma", "from 0", "M", "L", "f-f*", "left", "right", "ratio", "own")
    body = [
        (
            row["problem"],
            row["schedule"],
            row["K"],
            f"{row['rate']:g}",
            *(f"{row[name]:.3f}" for name in ("sigma", "sigma_from_0")),
            f"{row['second_moment']:.4f}",
            f"{row['lipschitz']:.2f}",
            f"{row['excess']:.3f}",
            *(f"{row['curves'][name][-1]:.3g}" for name in ("left", "right")),
            *(f"{row[name]:.1f}" for name in ("ratio", "ratio_own_second_moment")),
            "yes" if row["holds"] else "NO",
            f"{row['against']:.1%}",
        )
        for row in result["rows"]
    ]
    title = "left and right side of (9) or (11) at the last T; sigma, M: extremes along the run from t = K-1 on"
    return f"{title}\n\n{text_table((*head, 'holds', 'against'), body, left=2)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0, 1 if a file cannot be written, 2 for bad arguments."""
    return harness.main("theorems", TheoremsSettings(), run, arguments)


def run(settings: TheoremsSettings) -> int:
    """Runs everything, prints the table and writes the files; returns the exit code.

    Raises:
      SettingsError: a setting cannot be used.
    """
    check(settings)
    result = measure_all(settings)
    print(table(result), flush=True)
    if settings.output is not None:
        return write_results(settings.output, dict(zip(FILES, (result, png(figure(result))), strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
