"""Figures 2 and 3 of the BlockProp paper: ``python -m fr_jax.experiments.blockprop --figure 2``.

Figure 2: one hidden layer on MNIST, two blocks, the number of h-steps N_h and the penalty lambda_1 varied. Figure 3: a
residual network on CIFAR-10, two blocks, lambda_1 and the blocks' step sizes varied. Runs of one seed start from the
same weights and see the same mini-batches. Given again, the command repeats no run that is finished.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from fr_jax.data import image_sets as data
from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.harness import command, one_process
from fr_jax.experiments._cli.results import write_results
from fr_jax.experiments._run.many_runs import train_all
from fr_jax.experiments.blockprop.picture import figure
from fr_jax.experiments.blockprop.plan import lines_of, settings_of_run
from fr_jax.experiments.blockprop.result import summarise, table
from fr_jax.experiments.blockprop.settings import BlockPropSettings, resolve
from fr_jax.plotting.style import png

__all__ = ["BlockPropSettings", "main", "run"]


def run(settings: BlockPropSettings) -> int:
    """Trains what is not trained yet, writes numbers, table and picture, and returns the exit code.

    Raises:
      ValueError: a setting cannot be used, data are missing, or the folder holds other runs.
      CheckpointError, OSError: the folder cannot be read or written.
    """
    one_process("blockprop trains one run after another in one process.")
    s = resolve(settings)
    lines = list(lines_of(s))
    # Seed by seed, so that a first figure can be drawn early.
    runs = {one.run_name(seed): settings_of_run(one, seed, s) for seed, one in itertools.product(s.seeds or (), lines)}
    dataset = data.load(s.dataset, s.data_dir, preferred="mnist" if s.figure == 2 else "cifar10")
    s = dataclasses.replace(s, test_examples=min(s.test_examples or sys.maxsize, len(dataset.test_labels)))
    home = s.workdir or Path("runs") / f"blockprop-figure-{s.figure}"
    again = dataclasses.replace(settings, dataset=dataset.name, workdir=home, overwrite=False)
    code = train_all(
        {name: dataclasses.replace(run, test_examples=s.test_examples) for name, run in runs.items()},
        home,
        dataset,
        caller="blockprop",
        again=command("blockprop", BlockPropSettings(), again),
        overwrite=s.overwrite,
    )
    result = summarise(s, lines, home, dataset)
    if not result["lines"]:
        return code
    name, text = f"figure-{s.figure}", table(result)
    files = {f"{name}.json": result, f"{name}.png": png(figure(result)), "table.md": f"{text}\n".encode()}
    written = write_results(home, files)
    print(f"\n{text}\n\nPicture, numbers and table are in {home}.")
    return code or written


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code: 0 finished, 2 bad arguments or data, 130 or 143 stopped."""
    return harness.main("blockprop", BlockPropSettings(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
