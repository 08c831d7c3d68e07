"""The lines of BlockProp's figures, and the runs that they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fr_jax.experiments._cli.checks import check
from fr_jax.experiments._cli.settings import TrainSettings
from fr_jax.experiments.blockprop.settings import BlockPropSettings

__all__ = ["Line", "first_block_factor", "lines_of", "settings_of_run"]

PENALTY_PANELS = (4, 2)
"""N_h of the two panels of figure 2 in which lambda_1 varies."""


class Line(NamedTuple):
    """A line of the figure: a run per seed; a run may belong to several lines.

    Attributes:
      panel: which panel it belongs to; ``baseline`` and ``frozen`` are in all.
      label: in the legend.
      rates: gamma_B1, gamma_B2, the step size of each block.
      own: BlockProp's own settings; empty for back-propagation.
    """

    panel: str
    label: str
    rates: tuple[float, float]
    own: Mapping[str, Any] = MappingProxyType({})

    @property
    def factor(self) -> float:
        """Block 1's step as a multiple of what back-propagation with gamma_B2 would do, to first order in gamma_h."""
        return self.rates[0] / self.rates[1] * (first_block_factor(**self.own) if self.own else 1.0)

    @property
    def method(self) -> str:
        """Its short name."""
        return "blockprop" if self.own else "bp"

    def run_name(self, seed: int) -> str:
        """Of a run's folder: ``blockprop-penalty10-steps4-rates0.1-0.1-seed0``."""
        own = f"-penalty{self.own['penalty']:g}-steps{self.own['h_steps']}" if self.own else ""
        return f"{self.method}{own}-rates{self.rates[0]:g}-{self.rates[1]:g}-seed{seed}"


def first_block_factor(penalty: float, h_learning_rate: float, h_steps: int) -> float:
    """How much of back-propagation's gradient block 1 of two gets: 1 - (1 - 2 lambda gamma_h)^{N_h}.

    N_h steps from h = b_1(x) on loss(h) + lambda ||h - b_1(x)||^2 with a loss that is linear in h, of slope d, end at
    b_1(x) - d (1 - (1 - 2 lambda gamma_h)^{N_h}) / (2 lambda); block 1's gradient is 2 lambda times what is missing.
    With one step that is exact for every loss. It is not the paper's, which does not say how much reaches block 1.

    Args:
      penalty: lambda_1.
      h_learning_rate: gamma_h.
      h_steps: N_h.

    Returns:
      1 is back-propagation's gradient; 0 nothing; negative values climb.

    Example:
      >>> [round(first_block_factor(penalty, 0.01, 4), 4) for penalty in (1, 10, 50, 90, 100, 110)]
      [0.0776, 0.5904, 1.0, 0.5904, 0.0, -1.0736]
    """
    return 1 - (1 - 2 * penalty * h_learning_rate) ** h_steps


def lines_of(s: BlockPropSettings) -> Iterator[Line]:
    """The lines of the figure; ``s`` is resolved."""
    own = lambda penalty, h_steps: {"penalty": penalty, "h_steps": h_steps, "h_learning_rate": s.h_learning_rate}
    rate = s.learning_rate or 0.0
    if s.figure == 3:
        yield Line("baseline", rf"back-propagation, $\gamma = {rate:g}$", (rate, rate))
        for penalty, first, second in s.choices or ():
            label = rf"$\lambda_1 = {penalty:g}$, $\gamma_{{B_1}} = {first:g}$, $\gamma_{{B_2}} = {second:g}$"
            yield Line("choices", label, (first, second), own(penalty, 1))
        return
    yield Line("baseline", "back-propagation", (rate, rate))
    # Without h-steps h is b_1(x): the gluing loss is 0, and block 1 never moves.
    yield Line("frozen", "block 1 frozen ($N_h = 0$)", (rate, rate), own(1.0, 0))
    for h_steps in s.h_steps or ():
        yield Line("h_steps", f"$N_h = {h_steps}$", (rate, rate), own(1.0, h_steps))
    for h_steps, penalty in itertools.product(PENALTY_PANELS, s.penalties or ()):
        yield Line(f"penalty, N_h = {h_steps}", rf"$\lambda_1 = {penalty:g}$", (rate, rate), own(penalty, h_steps))
    for scale in s.scales or ():
        yield Line("control", f"back-propagation, block 1's step x {scale:g}", (scale * rate, rate))


def settings_of_run(line: Line, seed: int, s: BlockPropSettings) -> TrainSettings:
    """What a line's run with the seed is trained with.

    Raises:
      SettingsError: a setting cannot be used.
    """
    same = ("model", "momentum", "milestones", "batch_size", "epochs", "steps", "eval_every", "compilation_cache")
    common: dict[str, Any] = {name: getattr(s, name) for name in same}
    if s.figure == 2:
        common |= {"depth": 2, "width": s.width}
    equal = line.rates[0] == line.rates[1]
    # Back-propagation is cut only if its two blocks have different step sizes.
    settings = TrainSettings(
        method=line.method,
        K=1 if equal and not line.own else 2,
        balance="uniform",
        learning_rate=line.rates[1],
        stage_learning_rates=None if equal else line.rates,
        weight_decay=0.0,
        seed=seed,
        devices=1,
        **common,
        **line.own,
    )
    check(settings)
    return settings
