"""From the command line to settings, and back."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence

from fr_jax.experiments.settings import PRESETS, SettingsError, TrainSettings, flag

__all__ = ["command", "parse"]

PROGRAM = "python -m fr_jax.experiments.cifar"


def parse(arguments: Sequence[str]) -> TrainSettings:
    """Reads the command line; ``--help`` and malformed flags end the program (exit code 0 and 2).

    Raises:
      SettingsError: tyro is not installed.
    """
    try:
        import tyro
    except ImportError:
        raise SettingsError(
            "the command line needs the package tyro, which is not installed here. Install it (pip install tyro), or "
            "call fr_jax.experiments.cifar.run(TrainSettings(...)) from Python."
        ) from None
    return tyro.cli(TrainSettings, args=list(arguments), default=_defaults(arguments), prog=PROGRAM)


def _defaults(arguments: Sequence[str]) -> TrainSettings:
    """What the flags that are not given stand for: the preset's values, if there is one that is known."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", nargs="?")
    early.add_argument("--steps", nargs="?")
    given, _ = early.parse_known_args(list(arguments))
    defaults = TrainSettings(preset=given.preset, **PRESETS.get(given.preset, {}))
    # A run has one length, and a flag wins over the preset.
    return defaults if given.steps is None else dataclasses.replace(defaults, epochs=None)


def command(settings: TrainSettings) -> str:
    """The command line that gives these settings; what a preset stands for is written out."""
    words = [PROGRAM]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default or field.name == "preset":
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else f"--no-{flag(field.name)[2:]}")
        elif isinstance(value, tuple):
            words += [flag(field.name), *map(str, value)]
        else:
            text = shlex.quote(str(value))
            words += [f"{flag(field.name)}={text}"] if text.startswith("-") else [flag(field.name), text]
    return " ".join(words)
