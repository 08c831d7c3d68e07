"""Trains a multilayer perceptron on MNIST as K decoupled stages: ``python -m fr_jax.experiments.mnist --K 3``.

BlockProp's network with one hidden layer (figure 2 of its paper): ``--preset blockprop --h-steps 2 --penalty 0.1``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fr_jax.experiments._cli.command_line import Program
from fr_jax.experiments._cli.settings import TrainSettings
from fr_jax.experiments._run import program

__all__ = ["MNIST", "main", "run"]

MNIST = Program("mnist", dataset="mnist", defaults=TrainSettings(K=3, model="mlp"))


def run(settings: TrainSettings) -> int:
    """Trains as ``settings`` say; returns the exit code, and raises as :func:`.program.run` does."""
    return program.run(MNIST, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 3 diverged, 130 or 143 stopped."""
    return program.main(MNIST, arguments)


if __name__ == "__main__":
    sys.exit(main())
