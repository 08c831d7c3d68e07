from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from fr_jax.experiments._run import program as program_module

Result: TypeAlias = tuple[int, str, str]
"""Exit code, stdout, stderr."""


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``(main, *arguments) -> Result``: a program in this process."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave an empty ``curves.png``: drawing takes as long as a small run."""
    monkeypatch.setattr(program_module, "plot_curves", lambda runs, path, **texts: Path(path).touch())
