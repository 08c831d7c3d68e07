"""Trains a network on CIFAR-10 as K decoupled stages: ``python -m fr_jax.experiments.cifar --K 4``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fr_jax.experiments._cli.command_line import Program
from fr_jax.experiments._cli.settings import TrainSettings
from fr_jax.experiments._run import program

__all__ = ["CIFAR", "main", "run"]

CIFAR = Program("cifar", dataset="cifar10", defaults=TrainSettings())


def run(settings: TrainSettings) -> int:
    """Trains as ``settings`` say; returns the exit code, and raises as :func:`.program.run` does."""
    return program.run(CIFAR, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 3 diverged, 130 or 143 stopped."""
    return program.main(CIFAR, arguments)


if __name__ == "__main__":
    sys.exit(main())
