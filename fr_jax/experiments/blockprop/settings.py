"""The settings of the BlockProp figures, and what they are where no flag is given."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from fr_jax.experiments._fields import SettingsError, check_fields, flag, setting, text

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
    h_steps: tuple[int, ...] | None = setting(None, least=1, series="distinct")
    """[figure 2] Numbers of h-steps N_h, at lambda_1 = 1. Default: 1 2 4 8 16."""
    penalties: tuple[float, ...] | None = setting(None, above=0, series="distinct")
    """[figure 2] Values of lambda_1, at N_h = 4 and at N_h = 2. Default: 0.1 1 10 50 90 100 110."""
    scales: tuple[float, ...] | None = setting(None, above=0)
    """[figure 2] Control: back-propagation with block 1's step times these. Default: 0.003 0.01 0.03 0.1 0.3."""
    choices: tuple[tuple[float, float, float], ...] | None = setting(None, series="distinct")
    """[figure 3] lambda_1, gamma_B1, gamma_B2 of each run, one after another."""
    h_learning_rate: float = setting(0.01, above=0)
    """gamma_h, the step size of the h-steps; the paper's."""
    learning_rate: float | None = setting(None, above=0)
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
    seeds: tuple[int, ...] | None = setting(None, least=0, series="distinct")
    """Lines are means over them. Default: 0 1 2; figure 3: 0."""
    eval_every: int | None = None
    """Steps between evaluations on the test set. Default: 117; figure 3: 100."""
    test_examples: int | None = setting(None, least=1)
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


SAME_STEPS, OTHER_STEPS = (0.01, 1.0, 10.0, 50.0, 200.0, 1000.0), ((1.0, 0.5, 0.05), (1.0, 0.05, 0.2))
OF_FIGURE: dict[int, dict[str, Any]] = {
    2: {
        "width": 256,
        "h_steps": (1, 2, 4, 8, 16),
        "penalties": (0.1, 1.0, 10.0, 50.0, 90.0, 100.0, 110.0),
        "scales": (0.003, 0.01, 0.03, 0.1, 0.3),
    },
    3: {"model": "resnet8", "choices": (*((penalty, 0.05, 0.05) for penalty in SAME_STEPS), *OTHER_STEPS)},
}
"""The settings that one figure alone has."""
NAMES = ("learning_rate", "momentum", "milestones", "batch_size", "epochs", "seeds", "eval_every")
DEFAULTS: dict[int, tuple[Any, ...]] = {
    2: (0.1, 0.0, (), 128, 10, (0, 1, 2), 117),
    3: (0.05, 0.9, (1.5,), 64, 2, (0,), 100),
}
PAPER: dict[int, dict[str, Any]] = {
    2: {"epochs": 30, "seeds": (0, 1, 2, 3, 4), "eval_every": 468},
    3: {"model": "resnet18", "batch_size": 128, "epochs": 100, "milestones": (50.0, 75.0), "eval_every": 390},
}


def resolve(settings: BlockPropSettings) -> BlockPropSettings:
    """Fills in the figure's defaults, and the preset's. Settings of single runs are checked when these are planned.

    Raises:
      SettingsError: a setting of the other figure was given, or one is out of range.
    """
    figure, other = settings.figure, 5 - settings.figure
    values: dict[str, Any] = {"model": "mlp", **OF_FIGURE[figure], **dict(zip(NAMES, DEFAULTS[figure], strict=True))}
    values |= PAPER[figure] if settings.preset else {}
    for name in OF_FIGURE[other]:
        if getattr(settings, name) not in (None, values.get(name)):
            raise SettingsError(f"{flag(name)} belongs to figure {other}, not to --figure {figure}. Drop the flag.")
    if settings.steps is not None:
        if settings.epochs is not None:
            raise SettingsError("--steps and --epochs were both given; a run has one length. Drop one of them.")
        del values["epochs"]
    resolved = dataclasses.replace(settings, **{k: v for k, v in values.items() if getattr(settings, k) is None})
    check_fields(resolved)
    numbers = [number for choice in resolved.choices or () for number in choice]
    if not all(0 < number < math.inf for number in numbers):
        raise SettingsError(f"--choices {text(numbers)} is out of range; each must be above 0, and finite.")
    return resolved
