"""The settings of the BlockProp figures, and what they are where no flag is given."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fr_jax.experiments._fields import SettingsError

__all__ = ["BlockPropSettings", "resolve"]


@dataclasses.dataclass(frozen=True)
class BlockPropSettings:
    """Train the networks of figure 2 or 3 of the BlockProp paper, and draw the figure.

    The paper states neither the step sizes of the weights nor mini-batch, epochs or (figure 2) hidden units: defaults
    are usual values at the scale of a CPU; --preset paper is figure 3's network at the length that such runs have.
    """

    figure: Literal[2, 3] = 2
    """2: MNIST, N_h and lambda_1. 3: CIFAR-10, lambda_1 and the blocks' step sizes."""
    preset: Literal["paper"] | None = None
    """paper: figure 2 for 30 epochs and 5 seeds; figure 3 with ResNet-18, for 100 epochs. Flags win."""
    model: str | None = None
    """[figure 3] A name from fr_jax.models.MODELS. Default: resnet8."""
    width: int | None = None
    """[figure 2] Hidden units. Default: 256."""
    h_steps: tuple[int, ...] | None = None
    """[figure 2] Numbers of h-steps N_h, at lambda_1 = 1. Default: 1 2 4 8 16."""
    penalties: tuple[float, ...] | None = None
    """[figure 2] Values of lambda_1, at N_h = 4 and at N_h = 2. Default: 0.1 1 10 50 90 100 110."""
    scales: tuple[float, ...] | None = None
    """[figure 2] Control: back-propagation with block 1's step times these. Default: 0.003 0.01 0.03 0.1 0.3."""
    choices: tuple[tuple[float, float, float], ...] | None = None
    """[figure 3] lambda_1, gamma_B1, gamma_B2 of each run, one after another."""
    h_learning_rate: float = 0.01
    """gamma_h, the step size of the h-steps; the paper's."""
    learning_rate: float | None = None
    """Step size of back-propagation, and in figure 2 of both blocks. Default: 0.1; figure 3: 0.05."""
    momentum: float | None = None
    """Of SGD. Default: 0; figure 3: 0.9. There is no weight decay."""
    milestones: tuple[float, ...] | None = None
    """Epochs after which all step sizes are divided by 10. Default: none; figure 3: 1.5."""
    batch_size: int | None = None
    """Examples of a mini-batch. Default: 128; figure 3: 64."""
    epochs: int | None = None
    """Passes over the training set. Default: 10; figure 3: 2."""
    steps: int | None = None
    """Mini-batches to train for, instead of epochs."""
    seeds: tuple[int, ...] | None = None
    """Lines are means over them. Default: 0 1 2; figure 3: 0."""
    eval_every: int | None = None
    """Steps between evaluations on the test set. Default: 117; figure 3: 100."""
    test_examples: int | None = None
    """Evaluate on the first so many test images only. Default: all."""
    dataset: str = "auto"
    """mnist (figure 2) or cifar10 (figure 3), or any other that fr_jax knows; auto: that of the figure."""
    data_dir: Path | None = None
    """Folder with the official files (MNIST: idx or .gz, CIFAR: .bin or .tar.gz), or a TFDS folder."""
    workdir: Path | None = None
    """Folder of the runs, of figure-N.json, figure-N.png and table.md. Default: runs/blockprop-figure-N."""
    compilation_cache: str = "auto"
    """Folder where compiled code is kept for the next start; auto: in the user's cache folder; none: nowhere."""
    overwrite: bool = False
    """Delete the runs in the folder that are asked for, and start them again."""


DEFAULTS: dict[int, dict[str, Any]] = {
    2: {
        "model": "mlp",
        "width": 256,
        "h_steps": (1, 2, 4, 8, 16),
        "penalties": (0.1, 1.0, 10.0, 50.0, 90.0, 100.0, 110.0),
        "scales": (0.003, 0.01, 0.03, 0.1, 0.3),
        "learning_rate": 0.1,
        "momentum": 0.0,
        "milestones": (),
        "batch_size": 128,
        "epochs": 10,
        "seeds": (0, 1, 2),
        "eval_every": 117,
    },
    3: {
        "model": "resnet8",
        "choices": (
            *((penalty, 0.05, 0.05) for penalty in (0.01, 1.0, 10.0, 50.0, 200.0, 1000.0)),
            (1.0, 0.5, 0.05),
            (1.0, 0.05, 0.2),
        ),
        "learning_rate": 0.05,
        "momentum": 0.9,
        "milestones": (1.5,),
        "batch_size": 64,
        "epochs": 2,
        "seeds": (0,),
        "eval_every": 100,
    },
}
PAPER: dict[int, dict[str, Any]] = {
    2: {"epochs": 30, "seeds": (0, 1, 2, 3, 4), "eval_every": 468},
    3: {"model": "resnet18", "batch_size": 128, "epochs": 100, "milestones": (50.0, 75.0), "eval_every": 390},
}


def resolve(settings: BlockPropSettings) -> BlockPropSettings:
    """Fills in the figure's defaults, and the preset's.

    Raises:
      SettingsError: a setting of the other figure was given, or one that cannot be.
    """
    own, other = DEFAULTS[settings.figure], DEFAULTS[5 - settings.figure]
    for name in (*other, "model"):
        if (name not in own or (name, settings.figure) == ("model", 2)) and getattr(settings, name) is not None:
            raise SettingsError(
                f"--{name.replace('_', '-')} belongs to figure {5 - settings.figure}, not to --figure "
                f"{settings.figure}. Drop the flag."
            )
    if settings.steps is not None and settings.epochs is not None:
        raise SettingsError("--steps and --epochs were both given; a run has one length. Drop one of them.")
    values = {**own, **(PAPER[settings.figure] if settings.preset else {})}
    if settings.steps is not None:
        values["epochs"] = None
    missing = {name: value for name, value in values.items() if getattr(settings, name) is None}
    resolved = dataclasses.replace(settings, **missing)
    for name in ("h_steps", "penalties", "scales", "choices", "seeds"):
        _check_list(name, getattr(resolved, name))
    for name in ("learning_rate", "h_learning_rate"):
        if not 0 < getattr(resolved, name) < math.inf:
            raise SettingsError(f"--{name.replace('_', '-')} {getattr(resolved, name)}: give a number above 0.")
    if settings.test_examples is not None and settings.test_examples < 1:
        raise SettingsError(f"--test-examples {settings.test_examples}: give 1 or more.")
    return resolved


def _check_list(name: str, values: Sequence[Any] | None) -> None:
    if values is None or (not values and name == "scales"):
        return
    least = {"h_steps": 1, "seeds": 0}.get(name)
    numbers = list(itertools.chain(*values)) if name == "choices" else values
    good = all(number >= least if least is not None else 0 < number < math.inf for number in numbers)
    if not values or not good or len(set(values)) < len(values):
        text = " ".join(map(str, numbers))
        kind = f"whole numbers, each {least} or more" if least is not None else "numbers above 0"
        raise SettingsError(f"--{name.replace('_', '-')} {text}: give one or more different {kind}.")
