"""The tables of ``fr_jax.experiments.time_to_loss``, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fr_jax.experiments._cli.tables import markdown_table, mean_and_deviation
from fr_jax.experiments._methods import DATA_PARALLEL, REFERENCES

__all__ = ["PIPELINE", "Candidate", "beside_M", "candidates", "groups", "tables"]

PIPELINE = "gpipe"
"""The synchronous pipeline beside the others, by its 1F1B schedule."""


class Candidate(NamedTuple):
    """A way to train with K devices.

    Attributes:
      label: for people.
      method: a name, for its colour.
      steps: updates of its runs; None for what makes back-propagation's.
      updates: how many it needs, over back-propagation's.
      seconds: of an update, by ratio.
      memory: bytes of the device with most.
    """

    label: str
    method: str
    steps: int | None
    updates: float
    seconds: Mapping[str, float]
    memory: int

    def time(self, ratio: str) -> float:
        """Seconds of what back-propagation learns in one update."""
        return self.updates * self.seconds[ratio]


def beside_M(K: int, M: int) -> int:
    """Micro-batches of the pipeline that a recipe is compared with: as many, or K if the recipe has one."""
    return M if M > 1 else K


def groups(result: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """``(optimizer, K, M)`` of the pipelines to compare with, in order."""
    found = {(row["optimizer"], row["K"], row["M"]) for row in result["steps"] if row["method"] == PIPELINE}
    return iter(sorted(found))


def candidates(result: Mapping[str, Any], optimizer: str, K: int, M: int) -> list[Candidate]:
    """1F1B with M micro-batches first, data parallelism, and every recipe that is compared with that pipeline.

    A recipe's updates are those of its runs with most updates.
    """
    rows = [row for row in result["steps"] if row["optimizer"] == optimizer]
    steps = {(row["method"], row["K"], row["M"], row["remedies"]): row for row in rows}
    titles = {PIPELINE: "1F1B", DATA_PARALLEL: REFERENCES[DATA_PARALLEL].title}
    found = [
        Candidate(title, name, None, 1.0, step["seconds"], step["largest_device"])
        for name, title in titles.items()
        for step in [steps[name, K, M if name == PIPELINE else 1, ""]]
    ]
    longest: dict[tuple, Mapping[str, Any]] = {}
    for row in result["lines"]:
        key = (row["method"], K, row["M"], row["remedies"])
        here = (row["optimizer"], row["K"], beside_M(K, row["M"])) == (optimizer, K, M) and key in steps
        if here and row["method"] != PIPELINE and row["extra_updates"] is not None:
            longest[key] = max(row, longest.get(key, row), key=lambda one: one["steps"])
    for key, row in longest.items():
        step = steps[key]
        extra = 1 + row["extra_updates"]
        found.append(
            Candidate(row["label"], row["method"], row["steps"], extra, step["seconds"], step["largest_device"])
        )
    return found


def tables(result: Mapping[str, Any]) -> str:
    """All of it as Markdown."""
    problem, settings = result["problem"], result["settings"]
    about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in problem.items() if name != "data_source")
    parts = [f"{about}. Data: {problem.get('data_source', 'not named')}.", updates_table(result)]
    if result["steps"]:
        parts += [time_table(result, f"{settings['at']:g}"), winners_table(result)]
    return "\n\n".join(parts)


def updates_table(result: Mapping[str, Any]) -> str:
    """Score and extra updates of every line, with the rates that were tried; ``~``: extrapolated."""
    head = ("optimizer", "recipe", "updates", "rate (tried)", f"test {result['headline']}", "extra updates", "seeds")
    body = []
    for row in result["lines"]:
        tried = " ".join(f"{rate}: {_number(score)}" for rate, score in row["learning_rates"].items())
        lost = [score is None for score in row["scores"]]
        seeds = [f"{seed}{' (diverged)' * gone}" for seed, gone in zip(row["seeds"], lost, strict=True)]
        extra, deviation = row["extra_updates"], row["extra_updates_deviation"]
        spread = "" if deviation is None else f" ± {deviation:.1%}"
        body.append(
            (
                row["optimizer"],
                row["label"],
                f"{row['steps']:,}",
                f"{row['learning_rate']:g} ({tried})",
                mean_and_deviation(row["scores"], lost, 4),
                "-" if extra is None else f"{'~' * row['beyond']}{extra:.1%}{spread}",
                ", ".join(seeds),
            )
        )
    return markdown_table(head, body)


def _number(score: float | None) -> str:
    return "diverged" if score is None else f"{score:.4f}"


def time_table(result: Mapping[str, Any], ratio: str) -> str:
    """Updates, seconds per update, memory and time to the loss at one speed of the links; the last over 1F1B's.

    M is that of 1F1B; "of": updates of the runs from which those of the method are known.
    """
    head = ("optimizer", "K", "M", "", "updates / bp's", "of", "ms/update", "MB", "memory / 1F1B", "1F1B's time / time")
    body = []
    for optimizer, K, M in groups(result):
        found = candidates(result, optimizer, K, M)
        pipeline = found[0]
        for one in found:
            body.append(
                (
                    optimizer,
                    K,
                    M,
                    one.label,
                    f"{one.updates:.3f}",
                    "" if one.steps is None else f"{one.steps:,}",
                    f"{1000 * one.seconds[ratio]:.1f}",
                    f"{one.memory / 1e6:.1f}",
                    f"{one.memory / pipeline.memory:.2f}",
                    f"{pipeline.time(ratio) / one.time(ratio):.2f}",
                )
            )
    return f"Transfer/compute ratio {ratio}\n\n{markdown_table(head, body)}"


def winners_table(result: Mapping[str, Any]) -> str:
    """Who is first to the loss, by ratio and by the memory of a device."""
    ratios = [f"{ratio:g}" for ratio in result["settings"]["ratios"]]
    head = ("optimizer", "K", "M", "memory / 1F1B", *(f"ratio {ratio}" for ratio in ratios))
    body = []
    for optimizer, K, M in groups(result):
        found = candidates(result, optimizer, K, M)
        pipeline = found[0]
        for limit in (*result["settings"]["memory"], None):
            fitting = [one for one in found if limit is None or one.memory <= limit * pipeline.memory]
            cells = []
            for ratio in ratios:
                best = min(fitting, key=lambda one, ratio=ratio: one.time(ratio), default=None)
                speed = "" if best is None else f"{pipeline.time(ratio) / best.time(ratio):.2f}"
                cells.append("nothing fits" if best is None else f"{best.label} ({speed})")
            body.append((optimizer, K, M, "any" if limit is None else f"{limit:g}", *cells))
    note = "First to the loss, and how many times as fast as 1F1B with the same number of micro-batches"
    return f"{note}\n\n{markdown_table(head, body)}"
