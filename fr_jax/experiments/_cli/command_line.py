"""From the command line of a training program to its settings, and back."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from fr_jax.experiments._cli import harness
from fr_jax.experiments._cli.settings import PRESETS, SharedSettings, TrainSettings, belongs, given
from fr_jax.experiments._fields import guard

__all__ = ["Program", "parse"]

Settings = TypeVar("Settings", bound=SharedSettings)


class Program(NamedTuple):
    """One of the training programs.

    Attributes:
      name: its module under ``fr_jax.experiments``.
      dataset: what ``--dataset auto`` looks for.
      defaults: its settings where no flag is given.
    """

    name: str
    dataset: str
    defaults: TrainSettings

    @property
    def call(self) -> str:
        """How a shell starts it."""
        return harness.call(self.name)


def parse(name: str, defaults: Settings, arguments: Sequence[str]) -> Settings:
    """Reads a command line that may have a ``--preset``, as :func:`fr_jax.experiments._cli.harness.parse` does."""
    given_by_program = defaults
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", nargs="?")
    early.add_argument("--steps", nargs="?")
    early.add_argument("--epochs", nargs="?")
    asked, _ = early.parse_known_args(list(arguments))
    fields = {field.name for field in dataclasses.fields(defaults)}
    preset: dict[str, Any] = {k: v for k, v in PRESETS.get(asked.preset, {}).items() if k in fields}
    if isinstance(getattr(defaults, "K", None), tuple):  # a comparison has lists of these
        preset = {k: v for k, v in preset.items() if k not in ("K", "method")}
    defaults = dataclasses.replace(defaults, preset=asked.preset, **preset)
    # A run has one length, and a flag wins over the preset.
    if asked.steps is not None:
        defaults = dataclasses.replace(defaults, epochs=None)
    elif asked.epochs is not None:
        defaults = dataclasses.replace(defaults, steps=None)
    return _fitting(harness.parse(name, defaults, arguments), given_by_program)


def _fitting(settings: Settings, defaults: Settings) -> Settings:
    """Without what a program's own defaults set for another method or model than the chosen one."""
    if not isinstance(settings, TrainSettings):
        return settings
    names = [field.name for field in dataclasses.fields(settings) if guard(field).owners]
    return dataclasses.replace(
        settings,
        **{
            name: None
            for name in names
            if given(defaults, name)
            and getattr(settings, name) == getattr(defaults, name)
            and not belongs(name, settings.method, settings.model)
        },
    )
