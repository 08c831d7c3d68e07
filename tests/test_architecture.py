"""Keeps the house in order: who may import whom, and how long a file and a function may be.

A file imports only from floors strictly below its own. The exceptions are the constants below, and no others.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "fr_jax"

# A room is the first part of a module's name; inside experiments/ it is the second part too: a program is a room.
FLOORS = {
    "types": 1,
    "_files": 1,
    "_interrupts": 1,
    "distributed": 1,
    "reference": 1,
    "stages": 2,
    "_placement": 1.5,
    "_arrays": 2,
    "algorithms": 3,
    "data": 3,
    "models": 3,
    "partitioning": 3,
    "launch": 3,
    "diagnostics": 4,
    "training": 4,
    "plotting": 5,
    "experiments": 6,
    "experiments._fields": 6.1,
    "experiments._cards": 6.15,
    "experiments._dense_cards": 6.17,
    "experiments._remedies": 6.15,
    "experiments._methods": 6.2,
    "experiments._models": 6.2,
    "experiments._cli": 6.3,
    "experiments._run": 6.4,
    "experiments._bench": 6.5,
}
PROGRAM_FLOOR = 7
# The package's own __init__ gathers the library for its users: it stands above floor 4, and programs may import it.
LIBRARY_FLOOR = 4.5

SIBLINGS_MAY_MEET = set(FLOORS) - {"algorithms", "experiments"}
PARTS_OF_METHODS = (
    *(
        "_auxiliary",
        "_clipping",
        "_delayed",
        "_dense",
        "_example_cache",
        "_functions",
        "_history",
        "_layers",
        "_losses",
    ),
    *("_microbatches", "_nonfinite", "_per_layer", "_stages", "_step", "_training", "_validation", "_vjp", "staleness"),
)
SHARED_BY_METHODS = {f"fr_jax.algorithms.{name}" for name in PARTS_OF_METHODS}
IMPORTS_NOTHING_OF_THE_REST = {"reference", "types"}
NEVER_IMPORTS = {"training": {"algorithms"}}  # it sees an Algorithm, never a concrete method
MAY_IMPORT_FLAX = {"models", "stages"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def room(module: str) -> str:
    """The part of a module's name that decides its floor; empty for the package itself."""
    first, second = [*module.split("."), "", ""][1:3]
    return f"{first}.{second}" if first == "experiments" and second else first


def floor(module: str) -> float | None:
    if not room(module):
        return LIBRARY_FLOOR
    return FLOORS.get(room(module), PROGRAM_FLOOR if room(module).startswith("experiments.") else None)


def imported_names(module: str, is_package: bool, source: str) -> Iterator[str]:
    """Every module or ``module.name`` that a source imports, anywhere in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_graph(sources: Mapping[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports; ``from a import b`` is ``a.b`` where that is a module."""
    graph = {}
    for module, source in sources.items():
        targets = set()
        for name in imported_names(module, module in packages, source):
            if name.split(".")[0] == PACKAGE:
                while name not in sources and "." in name:
                    name = name.rpartition(".")[0]
                targets.add(name)
        graph[module] = targets
    return graph


def forbidden(module: str, target: str, packages: set[str]) -> str | None:
    """Why ``module`` may not import ``target``, or None where it may."""
    here, there = room(module), room(target)
    if there in NEVER_IMPORTS.get(here, ()):
        return f"{here}/ never imports {there}/"
    if here == there and module in packages:
        return None
    if here == there == "algorithms":
        ok = target in SHARED_BY_METHODS or target.rpartition(".")[0] in SHARED_BY_METHODS & packages
        return None if ok else "methods do not import each other: what two of them share goes down to algorithms/_step"
    if here == there and (here in SIBLINGS_MAY_MEET or floor(module) == PROGRAM_FLOOR):
        return "it is the package it belongs to" if target in packages and target.count(".") == 1 else None
    if here in IMPORTS_NOTHING_OF_THE_REST:
        return f"{here}/ imports nothing of the rest"
    if floor(module) == floor(target) == PROGRAM_FLOOR:
        return "no program imports another: what two of them share goes to _cli, _run or _bench"
    if floor(module) <= floor(target):
        return f"floor {floor(module)} may import only from floors below it, and {target} is on floor {floor(target)}"
    return None


def circles(graph: Mapping[str, set[str]]) -> Iterator[str]:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> Iterator[str]:
        if module in path:
            yield "a circle of imports: " + " -> ".join([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                yield from visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        yield from visit(module, ())


def violations(sources: Mapping[str, str], packages: set[str]) -> list[str]:
    """Everything that is wrong with a package given as ``{module name: source}``."""
    found = []
    homeless = {module for module in sources if floor(module) is None}
    found += [f"{module}: no floor; give its room one in architecture and in this test" for module in sorted(homeless)]
    found += [f"{module}: say what it does, not that it is a utility" for module in sources if "util" in module]
    graph = import_graph(sources, packages)
    for module in sorted(set(sources) - homeless):
        for target in sorted(graph[module] - homeless):
            if reason := forbidden(module, target, packages):
                found.append(f"{module} imports {target}: {reason}")
        uses_flax = any(name.split(".")[0] == "flax" for name in imported_names(module, False, sources[module]))
        if uses_flax and room(module) not in MAY_IMPORT_FLAX:
            found.append(f"{module} imports flax: only models/ and stages/ touch it")
    return found + list(circles(graph))


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and length in lines, without decorators and docstring, of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, length


def too_long(name: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    found = [f"{name}: {lines} lines, at most {MAX_FILE_LINES}: split it"] if lines > MAX_FILE_LINES else []
    for function, length in functions(ast.parse(source)):
        if length > MAX_FUNCTION_LINES:
            found.append(f"{name}: {function} has {length} lines without docstring, at most {MAX_FUNCTION_LINES}")
    return found


def read_package() -> tuple[dict[str, str], set[str]]:
    sources, packages = {}, set()
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            packages.add(".".join(parts))
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return sources, packages


def test_imports_go_down_only():
    sources, packages = read_package()
    assert "fr_jax.types" in sources
    assert violations(sources, packages) == []


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE).rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert too_long(path.name, path.read_text(encoding="utf-8")) == []


MADE_UP = {
    "fr_jax": "from fr_jax import models\nfrom fr_jax.stages import chain\n",
    "fr_jax.types": "",
    "fr_jax._placement": "from fr_jax.types import Array\n",
    "fr_jax.stages": "from fr_jax.types import Stage\nfrom flax import linen as nn\n",
    "fr_jax.partitioning": "",
    "fr_jax.partitioning.balance": "",
    "fr_jax.reference": "",
    "fr_jax.reference.chain_rule": "import numpy as np\n",
    "fr_jax.algorithms": "",
    "fr_jax.algorithms._functions": "from fr_jax import _placement\n",
    "fr_jax.algorithms.ddg": "from fr_jax.algorithms import _functions\n",
    "fr_jax.algorithms.dni": "",
    "fr_jax.models": "from fr_jax.models.mlp import mlp\n",
    "fr_jax.models.mlp": "import flax.linen as nn\n",
    "fr_jax.training": "",
    "fr_jax.training.loop": "from fr_jax.training import metrics_log\n",
    "fr_jax.training.metrics_log": "",
    "fr_jax.experiments": "",
    "fr_jax.experiments._cli": "",
    "fr_jax.experiments._cli.settings": "",
    "fr_jax.experiments.cifar": "import fr_jax as fr\nfrom fr_jax.training.loop import train\n",
    "fr_jax.experiments.speed": "",
    "fr_jax.experiments.speed.__main__": "from fr_jax.experiments.speed import picture\n",
    "fr_jax.experiments.speed.picture": "from fr_jax.experiments._cli import settings\n",
}
MADE_UP_PACKAGES = {
    module for module in MADE_UP if module == PACKAGE or any(other.startswith(module + ".") for other in MADE_UP)
}


def test_checker_accepts_a_sound_package():
    assert violations(MADE_UP, MADE_UP_PACKAGES) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("fr_jax.types", "from fr_jax.stages import chain", "imports nothing of the rest"),
        ("fr_jax.stages", "from fr_jax import _arrays", "floor 2"),
        ("fr_jax.stages", "import fr_jax", "floor 2"),
        ("fr_jax.stages", "def late():\n    import fr_jax.partitioning.balance", "floor 2"),
        ("fr_jax.algorithms.ddg", "from fr_jax.algorithms.dni import dni", "methods do not import each other"),
        ("fr_jax.algorithms.ddg", "from . import dni", "methods do not import each other"),
        ("fr_jax.algorithms.ddg", "from ..models import mlp", "floor 3"),
        ("fr_jax.algorithms.ddg", "from fr_jax.training.loop import train", "floor 3"),
        ("fr_jax.algorithms.ddg", "from flax import struct", "only models/ and stages/"),
        ("fr_jax.algorithms._functions", "from fr_jax.algorithms.ddg import ddg", "methods do not import each other"),
        ("fr_jax.training.loop", "from fr_jax.algorithms.ddg import ddg", "training/ never imports algorithms/"),
        ("fr_jax.training.loop", "from fr_jax.experiments.cifar import main", "floor 4"),
        ("fr_jax.training.metrics_log", "from fr_jax.training.loop import train", "a circle of imports"),
        ("fr_jax.models.mlp", "from fr_jax.models import MODELS", "the package it belongs to"),
        ("fr_jax.reference.chain_rule", "from fr_jax.types import Array", "imports nothing of the rest"),
        ("fr_jax.experiments._cli.settings", "from fr_jax.experiments import cifar", "floor 6.3"),
        ("fr_jax.experiments.cifar", "from fr_jax.experiments.speed.picture import draw", "no program imports another"),
        ("fr_jax.training.utils", "", "not that it is a utility"),
        ("fr_jax.attic", "", "no floor"),
    ],
)
def test_checker_bites(module, source, complaint):
    found = violations({**MADE_UP, module: source}, MADE_UP_PACKAGES)
    assert any(line.startswith(module) and complaint in line for line in found) or any(
        line.startswith(complaint) and module in line for line in found
    ), found


def test_length_checker_bites():
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert "f has 61 lines" in too_long("a.py", f"def f():\n{body}")[0]
    assert too_long("a.py", f'def f():\n    """One\n\n    two.\n    """\n{body[10:]}') == []
    assert "401 lines" in too_long("a.py", "x = 1\n" * (MAX_FILE_LINES + 1))[0]
