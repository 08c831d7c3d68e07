"""What every program's ``main`` does: reads the command line, runs, and turns an error into one message and a code."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fr_jax import _interrupts, distributed
from fr_jax.distributed import GroupError
from fr_jax.experiments._fields import SettingsError, flag

__all__ = [
    "BAD_ARGUMENTS",
    "DIVERGED",
    "EXIT_CODES",
    "FAILED",
    "FINISHED",
    "call",
    "command",
    "discard_output",
    "exit_code",
    "fail",
    "main",
    "one_process",
    "parse",
]

FINISHED, FAILED, BAD_ARGUMENTS, DIVERGED, STOPPED = 0, 1, 2, 3, 130

# By name: a program that does without the data or the training room must not load it for its exceptions' sake.
EXIT_CODES: dict[str, int] = {
    "fr_jax.experiments._fields.SettingsError": BAD_ARGUMENTS,
    "fr_jax.data.download.DataError": BAD_ARGUMENTS,
    "fr_jax.training.run_folder.WorkdirError": BAD_ARGUMENTS,
    "fr_jax.training._saved_state.CheckpointError": FAILED,
    "builtins.OSError": FAILED,
    "builtins.KeyboardInterrupt": STOPPED,
}
"""Exceptions that are one message to the user, subclasses included; any other is a bug and keeps its traceback.

A GroupError brings its own code. A run that diverged returns 3; one that is asked to stop saves, and returns 130 or
143.
"""

Settings = TypeVar("Settings")


def main(
    name: str,
    defaults: Settings,
    run: Callable[[Settings], Any],
    arguments: Sequence[str] | None = None,
    *,
    read: Callable[[str, Settings, Sequence[str]], Settings] | None = None,
) -> int:
    """Runs a program on its command line.

    Args:
      name: its module under ``fr_jax.experiments``.
      defaults: its settings where no flag is given; a dataclass with one field per flag.
      run: the program; the exit code is what it returns, or 0 if that is not an integer.
      arguments: the words after the program's name; None for those of this process.
      read: what reads the command line, instead of :func:`parse`.

    Returns:
      The exit code: 0 finished, 1 failed, 2 bad arguments or missing data, 3 diverged, 130 or 143 stopped.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: run((read or parse)(name, defaults, words)))


def exit_code(work: Callable[[], Any]) -> int:
    """Does the work; an error that its user can fix is one message and an exit code (:data:`EXIT_CODES`)."""
    _interrupts.started()
    try:
        code = work()
        return code if isinstance(code, int) else FINISHED
    except GroupError as error:
        return error.exit_code if error.reported else fail(error, error.exit_code)
    except BrokenPipeError:
        discard_output()
        return fail("no one reads the output any more.", FAILED)
    except BaseException as error:
        names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
        code = next((EXIT_CODES[name] for name in names if name in EXIT_CODES), None)
        if code is None:
            distributed.group().fail(FAILED)
            raise
        return fail("stopped at once; what was not saved yet is lost." if code == STOPPED else error, code)


def fail(message: object, code: int) -> int:
    """Prints the message, unless another process of the group has failed before; returns the code."""
    if distributed.group().fail(code):
        print(f"fr_jax: {message}", file=sys.stderr)
    return code


def discard_output() -> None:
    """From now on what is printed goes nowhere: its reader (``| head``, a terminal that was closed) is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def call(name: str) -> str:
    """How a shell starts the program in the module ``name``."""
    return f"python -m fr_jax.experiments.{name}"


def parse(name: str, defaults: Settings, arguments: Sequence[str]) -> Settings:
    """Reads a command line; ``--help`` and malformed flags end the program (exit code 0 and 2).

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
    return tyro.cli(type(defaults), args=list(arguments), default=defaults, prog=call(name))


def command(name: str, defaults: Any, settings: Any) -> str:
    """The command line that gives these settings; what a preset stands for is written out."""
    words = [call(name)]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == getattr(defaults, field.name) or field.name == "preset":
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else f"--no-{flag(field.name)[2:]}")
        elif isinstance(value, tuple):
            words += [
                flag(field.name),
                *(shlex.quote(str(one)) for part in value for one in (part if isinstance(part, tuple) else (part,))),
            ]
        else:
            text = shlex.quote(str(value))
            words += [f"{flag(field.name)}={text}"] if str(value).startswith("-") else [flag(field.name), text]
    return " ".join(words)


def one_process(why: str, instead: str = "Start it without fr_jax.launch.", *, asked: bool = False) -> None:
    """Refuses to be one of several processes, before anything is done.

    Args:
      why: the program does not run so, a sentence.
      instead: what to do, a sentence.
      asked: whether its own flags ask for several, as the environment that ``fr_jax.launch`` makes does.

    Raises:
      SettingsError: it is one.
    """
    if asked or distributed.NUM_PROCESSES in os.environ:
        raise SettingsError(f"{why} {instead}")
