"""Every notebook runs on small settings, is committed as it ran, and can install the library where it is opened."""

import ast
import copy
import importlib.machinery
import importlib.util
import json
import os
import re
import site
import subprocess
import sys
import types
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import fr_jax

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 1_000_000

# What replaces settings of the cell that is tagged "parameters", as papermill would: a cell after it.
SMALL = {
    "01_backpropagation_from_scratch": """
        EXAMPLES, WIDTHS, SNAPSHOTS = 64, (3, 8, 8), (0, 2, 5)
        CHAINS, DEPTHS, NODES, MOST_PATHS = (1, 2, 4, 8), (1, 2, 4, 8), (2, 4, 8, 16), 1_000
    """,
    "02_features_replay": """
        K, LAYERS, WIDTH, BATCH_SIZE, EPOCHS, SEEDS = 2, 2, 8, 352, 2, (0, 1)
        LEARNING_RATES, SHORT_EPOCHS, MOST_STAGES = (0.05,), 1, 4
    """,
    "03_compare_methods": """
        K, DEPTH, WIDTH, BATCH, EPOCHS, SEEDS = 2, 4, 16, 128, 1, 1
        RATES, STALE_KS, STALE_RATES = [0.01], [2], [0.01]
        CHECK_EVERY, MEMORY_MODEL, MEMORY_KS = 4, "mlp", [1, 2]
        NAMED_WIDTH, ADMM_STEPS = 8, 2
    """,
    "04_your_own_model": """
        K, SPIRAL_STEPS, WIDTH, BLOCKS, HEADS = 2, 20, 16, 1, 2
        CONTEXT, BATCH, STEPS, LOOK_EVERY, SAMPLE = 16, 8, 20, 10, 20
    """,
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def assert_clean(found: list[nbformat.NotebookNode]) -> None:
    """There are pictures, and neither errors nor warnings."""
    assert any("image/png" in output.get("data", ()) for output in found)
    assert [output for output in found if output.output_type == "error" or output.get("name") == "stderr"] == []


def assigned(code: str) -> set[str]:
    stored = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name))
    return {node.id for node in stored if isinstance(node.ctx, ast.Store)}


def small_settings(path: Path) -> str:
    assert path.stem in SMALL, f"give SMALL an entry for {path.name}: settings with which it takes a few seconds"
    return "\n".join(line.strip() for line in SMALL[path.stem].strip().splitlines())


# What the others call has quick tests of its own: the reference, the program compare, stages and methods.
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem[:2] != "02" else []) for path in NOTEBOOKS],
)
def test_runs_on_small_settings(
    path: Path, tmp_path: Path, program_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = read(path)
    [tagged] = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    assert assigned(small_settings(path)) <= assigned(notebook.cells[tagged].source)
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell(small_settings(path)))
    env = {name: value for name, value in program_env.items() if name != "MPLBACKEND"}  # the kernel's own: inline
    folder = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder)
    client.execute(env=env | {"IPYTHONDIR": str(tmp_path / "ipython")})
    assert_clean(outputs(notebook))


@each_notebook
def test_is_committed_as_it_ran(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "run all cells, in order, in a fresh kernel"
    assert_clean(outputs(notebook))
    assert path.stat().st_size < MAX_BYTES
    assert not any("execution" in cell.metadata for cell in notebook.cells), "clear the times of execution"


@each_notebook
def test_names_no_place_of_a_machine(path: Path) -> None:
    notebook = copy.deepcopy(read(path))
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
    assert re.findall(r"[^\"\s]*/(?:tmp|work|home|root|Users)/[^\"\s]*", json.dumps(notebook)) == []


@each_notebook
def test_opens_with_a_title_the_install_cell_and_settings(path: Path) -> None:
    title, install, settings, *_ = read(path).cells
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert install.source == install_cell()
    assert settings.metadata.tags == ["parameters"]


@each_notebook
def test_links_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in local if not (path.parent / link).exists()] == []


def install_cell() -> str:
    return code_cells(NOTEBOOKS[0])[0].source


def with_source(source: str) -> str:
    empty = 'SOURCE = ""  # @param'
    assert install_cell().count(empty) == 1
    return install_cell().replace(empty, f"SOURCE = {source!r}  # @param")


@pytest.fixture
def pip_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str] | None]:
    """Runs the install cell in an empty folder; what pip was asked for, or None. Nothing is installed."""

    def run(source: str, found: Mapping[str, str | None] | None = None, returncode: int = 0) -> list[str] | None:
        """``found``: what can be imported, and the file that it comes from."""
        commands = []

        def pip(command: list[str], **options: bool) -> types.SimpleNamespace:
            commands.append(command)
            return types.SimpleNamespace(returncode=returncode, stderr="ERROR: no such thing")

        specs = {name: types.SimpleNamespace(origin=origin) for name, origin in (found or {}).items()}
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "run", pip)
            patched.setattr(site, "addsitedir", lambda folder: None)
            patched.setattr(importlib.util, "find_spec", specs.get)
            exec(with_source(source), {})
        if not commands:
            return None
        [command] = commands
        assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
        return command[5:]

    monkeypatch.chdir(tmp_path)
    return run


ADDRESS = "git+https://example.org/fr_jax"


def test_install_cell_leaves_what_is_installed_alone(pip_asked: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    assert pip_asked(ADDRESS, found={"fr_jax": fr_jax.__file__}) is None
    assert capsys.readouterr().out == f"fr_jax {fr_jax.__version__}\n"


def test_install_cell_is_not_misled_by_a_folder_of_that_name(pip_asked: Callable, tmp_path: Path) -> None:
    (tmp_path / "fr_jax").mkdir()
    assert importlib.machinery.PathFinder.find_spec("fr_jax", [str(tmp_path)]).origin is None
    assert pip_asked(ADDRESS, found={"fr_jax": None}) == [ADDRESS]


@pytest.mark.parametrize("source", [ADDRESS, "https://example.org/fr_jax.whl", "fr_jax @ git+https://example.org"])
def test_install_cell_takes_an_address(pip_asked: Callable, source: str) -> None:
    assert pip_asked(source) == [source]


def test_install_cell_takes_a_path(pip_asked: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "fr_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    (tmp_path / "fr_jax").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    # Absolute: "fr_jax" alone would be a name in the package index to pip.
    assert pip_asked(wheel.name) == pip_asked(f"~/{wheel.name}") == [str(wheel)]
    assert pip_asked("fr_jax") == [str(tmp_path / "fr_jax")]


def test_install_cell_finds_the_checkout_around_it(
    pip_asked: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    inside = tmp_path / "notebooks"
    inside.mkdir()
    (inside / "pyproject.toml").write_text('[project]\nname = "another"\n')
    monkeypatch.chdir(inside)
    assert pip_asked("") == ["-e", str(tmp_path)]


def test_install_cell_keeps_an_accelerators_plugin_at_the_version_of_jax(pip_asked: Callable) -> None:
    assert pip_asked(ADDRESS, found={"jax_cuda12_plugin": "there"}) == [ADDRESS, "jax[cuda12]"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [("", "does not lie in a checkout"), ("fr_jax", '"fr_jax" does not exist'), ("/no/wheel.whl", "does not exist")],
)
def test_install_cell_says_what_to_put_into_source(pip_asked: Callable, source: str, problem: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{problem}.*Put into SOURCE .*git\+https://.*wheel.*folder"):
        pip_asked(source)


def test_install_cell_shows_why_pip_failed(pip_asked: Callable) -> None:
    with pytest.raises(RuntimeError, match=r"pip install --quiet git\+.* failed:\nERROR: no such thing"):
        pip_asked(ADDRESS, returncode=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_install_cell_installs(tmp_path: Path) -> None:
    """Into a new environment, from the package index: first this folder, then this folder as the checkout around it."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = next(path for path in (tmp_path / "venv").glob("*/python*") if path.stem == "python")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*arguments: str, folder: Path) -> str:
        command = [python, *arguments]
        return subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout

    where = "\nprint(fr_jax.__file__)"
    version, place = run("-c", with_source(str(ROOT)) + where, folder=tmp_path).splitlines()
    assert version == f"fr_jax {fr_jax.__version__}" and Path(place).is_relative_to(tmp_path)
    run("-m", "pip", "uninstall", "--yes", "--quiet", "fr_jax", folder=tmp_path)
    version, place = run("-c", with_source("") + where, folder=ROOT / "notebooks").splitlines()
    assert version == f"fr_jax {fr_jax.__version__}" and Path(place) == ROOT / "fr_jax" / "__init__.py"
