"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    example, *further = blocks("python")
    assert len(example.strip().splitlines()) <= 16
    exec(example, names)
    loss, shape = re.fullmatch(r"loss (\S+) (.*)\n", capsys.readouterr().out).groups()
    assert float(loss) < 0.3 and shape == "(256, 1)"
    for block in further:
        exec(block, names)
    assert len(names["stages"]) == 4
    assert jax.tree.leaves(names["state"])


def test_commands_name_what_exists() -> None:
    main, tests, *_ = blocks("bash")
    assert "-m fr_jax.experiments.cifar --K 4" in main
    assert tests.rstrip().endswith("-m pytest")


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local and all((Path(__file__).parents[1] / target).exists() for target in local)
