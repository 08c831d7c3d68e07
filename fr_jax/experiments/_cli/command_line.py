"""From the command line to settings, and back."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from fr_jax.experiments._cli.settings import PRESETS, SettingsError, SharedSettings, TrainSettings, flag

__all__ = ["Program", "command", "parse"]

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
        return call(self.name)


def call(name: str) -> str:
    """How a shell starts the program in the module ``name``."""
    return f"python -m fr_jax.experiments.{name}"


def parse(name: str, defaults: Settings, arguments: Sequence[str]) -> Settings:
    """Reads the command line; ``--help`` and malformed flags end the program (exit code 0 and 2).

    Args:
      name: the program's module under ``fr_jax.experiments``.
      defaults: the settings where no flag is given; their class has one field a flag.
      arguments: the words after the program's name.

    Raises:
      SettingsError: tyro is not installed.
    """
    try:
        import tyro
    except ImportError:
        raise SettingsError(
            "the command line needs the package tyro, which is not installed here. Install it (pip install tyro), or "
            f"call fr_jax.experiments.{name}.run({type(defaults).__name__}(...)) from Python."
        ) from None
    words = list(arguments)
    return tyro.cli(type(defaults), args=words, default=_with_preset(defaults, words), prog=call(name))


def _with_preset(defaults: Settings, arguments: Sequence[str]) -> Settings:
    """What the flags that are not given stand for: the preset's values, if there is one that is known."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", nargs="?")
    early.add_argument("--steps", nargs="?")
    given, _ = early.parse_known_args(list(arguments))
    fields = {field.name: field.type for field in dataclasses.fields(defaults)}
    preset: dict[str, Any] = {k: v for k, v in PRESETS.get(given.preset, {}).items() if k in fields}
    if isinstance(getattr(defaults, "K", None), tuple):  # a comparison has lists of these
        preset = {k: v for k, v in preset.items() if k not in ("K", "method")}
    defaults = dataclasses.replace(defaults, preset=given.preset, **preset)
    # A run has one length, and a flag wins over the preset.
    return defaults if given.steps is None else dataclasses.replace(defaults, epochs=None)


def command(name: str, defaults: SharedSettings, settings: SharedSettings) -> str:
    """The command line that gives these settings; what a preset stands for is written out."""
    words = [call(name)]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == getattr(defaults, field.name) or field.name == "preset":
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else f"--no-{flag(field.name)[2:]}")
        elif isinstance(value, tuple):
            words += [flag(field.name), *map(str, value)]
        else:
            text = shlex.quote(str(value))
            words += [f"{flag(field.name)}={text}"] if text.startswith("-") else [flag(field.name), text]
    return " ".join(words)
