"""What the READMEs show is there: the main one's commands and examples run, those of the evidence are read."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from fr_jax.experiments._cli import harness
from fr_jax.experiments._fields import check_fields

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EVIDENCE = sorted((ROOT / "experiments").rglob("README.md"))

TINY = "--dataset synthetic --model mlp --depth 4 --width 8 --batch-size 16 --steps 3".split()  # noqa: SIM905
ADDED = {  # what makes a command small enough for a test; a flag that is given twice has its last value
    "cifar": TINY,
    "mnist": TINY,
    "lm": "--depth 2 --width 8 --heads 2 --context 8 --steps 3 --test-examples 16 --sample-bytes 4".split(),  # noqa: SIM905
    "sufficient_direction": [*TINY, "--every", "2", "--gradient-batches", "2"],
    "compare": [*TINY, "--methods", "bp", "fr", "ddg", "--seeds", "0", "1"],
    "speed": ["--model", "mlp", "--batch-size", "16", "--rounds", "1", "--steps", "1", "--balance", "flops"],
    "throughput": ["--models", "mlp", "--dtypes", "float32", "--batch-size", "16", "--rounds", "1", "--steps", "1"],
    "scaling": [],
    "memory": ["--models", "mlp", "--K", "1", "2", "--batch-size", "16"],
    "time_to_loss": ["--runs", str(ROOT / "experiments" / "time-to-loss" / "gpt"), "--updates-only"],
    "theorems": ["--steps", "50", "--replicas", "8", "--K", "2"],
}
SLOW = {*ADDED, "launch"}  # their own tests run them


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """The lines that start one of our programs, without their comments."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith("python -m fr_jax")]


def module_of(command: str) -> str:
    return shlex.split(command)[2].removeprefix("fr_jax.").removeprefix("experiments.")


def main_of(module: str):
    """The function ``main`` of what ``python -m module`` starts."""
    module = f"{module}.__main__" if importlib.util.find_spec(module).submodule_search_locations else module
    return importlib.import_module(module).main


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


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=pytest.mark.slow if module_of(one) in SLOW else ()) for one in commands()]
)
def test_every_command_runs(command, tmp_path, monkeypatch, program_env):
    words, module = shlex.split(command), module_of(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FR_JAX_CACHE", str(tmp_path / "cache"))
    if module == "launch" or "--pinned" in words:
        words += ADDED[words[-3].rpartition(".")[2] if module == "launch" else module]
        done = subprocess.run([sys.executable, *words[1:]], env=program_env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    else:
        assert main_of(words[2])([*words[3:], *ADDED[module]]) == 0


def shown(path: Path) -> Iterator[list[str]]:
    """The words after ``python`` of every command of ours that a README shows, in a block or between backticks."""
    text = path.read_text()
    fenced = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    inline = [one for one in re.findall(r"`(python -m [^`]*)`", text) if " .." not in one]
    for line in [*fenced, *(one.replace("\n", " ") for one in inline)]:
        words = shlex.split(line, comments=True)
        while "python" in words:
            words = words[words.index("python") + 1 :]
            yield words
            words = words[words.index("--") :] if "--" in words else []
            words[:1] = ["python"] if words else []


@pytest.mark.parametrize("path", [ROOT / "README.md", *EVIDENCE], ids=lambda path: path.parent.name)
def test_commands_have_programs_and_settings_that_exist(path, monkeypatch):
    def read_only(name, defaults, run, arguments, *, read=harness.parse):
        check_fields(read(name, defaults, arguments))
        return 0

    monkeypatch.setattr(harness, "main", read_only)
    for words in shown(path):
        if words[0] == "-m" and words[1].startswith("fr_jax.experiments."):
            assert main_of(words[1])(words[2:]) == 0


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.parent.name)
def test_scripts_of_the_evidence_import_what_exists(path):
    lines = "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)).splitlines()
    exec("\n".join(line for line in lines if line.startswith(("from ", "import "))), {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_main_command_on_a_fresh_machine(tmp_path):
    """Word for word in a copy of the tree, but for its length."""
    main = blocks("bash")[0].strip()
    assert main.endswith("-m fr_jax.experiments.cifar --K 4")
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "experiments-data", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=skipped)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    shell = f"{main} {shlex.join(TINY)}"
    done = subprocess.run(["bash", "-ec", shell], cwd=tmp_path / "tree", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list((tmp_path / "tree" / "runs").glob("*/curves.png"))


def test_test_command_is_that_of_ci() -> None:
    """``.ci/run`` runs the block after the mark ``<!-- tests -->``."""
    assert blocks("bash")[1].rstrip().endswith("-m pytest")
    assert README.index("<!-- tests -->") < README.index(blocks("bash")[1])


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local and all((ROOT / target).exists() for target in local)
