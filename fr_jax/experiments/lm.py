"""Trains a byte-level language model on text as K decoupled stages: ``python -m fr_jax.experiments.lm --K 4``.

The text is the source code of Python's standard library, or your own: ``--text FILE OR FOLDER``. At the end the model
writes a sample. ``--preset gpt2`` is for a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fr_jax.experiments._cli.command_line import Program
from fr_jax.experiments._cli.settings import BUBBLE_FREE, PRESETS, TrainSettings
from fr_jax.experiments._run import program

__all__ = ["LM", "main", "run"]

LM = Program("lm", dataset="python", defaults=TrainSettings(**PRESETS["lm"] | BUBBLE_FREE))


def run(settings: TrainSettings) -> int:
    """Trains as ``settings`` say; returns the exit code, and raises as :func:`.program.run` does."""
    return program.run(LM, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 3 diverged, 130 or 143 stopped."""
    return program.main(LM, arguments)


if __name__ == "__main__":
    sys.exit(main())
