"""From errors to exit codes, ``fr_jax.experiments._cli.harness``."""

import dataclasses
import pkgutil

import pytest

from fr_jax.data import DataError
from fr_jax.distributed import GroupError
from fr_jax.experiments._cli import harness
from fr_jax.experiments._fields import SettingsError
from fr_jax.training.checkpoints import CheckpointError
from fr_jax.training.run_folder import WorkdirError


def raising(error):
    def work(*settings):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("why"), 2),
        (DataError("why"), 2),
        (WorkdirError("why"), 2),
        (CheckpointError("why"), 1),
        (OSError("why"), 1),
        (FileNotFoundError("why"), 1),
        (GroupError("why", 7), 7),
    ],
)
def test_errors_that_a_user_can_fix_are_one_message(error, code, capsys):
    assert harness.exit_code(raising(error)) == code
    assert capsys.readouterr() == ("", "fr_jax: why\n")


def test_stops_and_what_another_process_has_reported(capsys):
    assert harness.exit_code(raising(GroupError("why", 7, reported=True))) == 7
    assert capsys.readouterr().err == ""
    assert harness.exit_code(raising(KeyboardInterrupt())) == 130
    assert "stopped at once" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), SystemExit(2)])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        harness.exit_code(raising(error))


def test_every_name_in_the_table_exists():
    """They are names, so that a program need not load the rooms that it does without."""
    for name in harness.EXIT_CODES:
        assert issubclass(pkgutil.resolve_name(name), BaseException)


@pytest.mark.parametrize(("returned", "code"), [(3, 3), (None, 0), ({"a": "result"}, 0)])
def test_main(returned, code):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        """A program.

        Attributes:
          K: stages.
        """

        K: int = 4

    seen = []
    work = lambda settings: (seen.append(settings), returned)[1]
    assert harness.main("name", Settings(), work, ["--K", "3"]) == code
    assert seen == [Settings(3)]
    assert harness.command("name", Settings(), seen[0]) == "python -m fr_jax.experiments.name --K 3"
