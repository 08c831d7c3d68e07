import ast
import importlib.metadata
import inspect
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import fr_jax

ROOT = Path(__file__).parents[1]


# Modules that are not called as the package that installs them.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = (one for extra in ("tfds", "tensorboard", "pytorch", "equinox") for one in extras[extra])
    requirements = [*project["dependencies"], *optional]
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imported_packages():
    for path in (ROOT / "fr_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            yield from (name.split(".")[0] for name in names)


def test_whatever_is_imported_is_declared():
    outside = set(imported_packages()) - sys.stdlib_module_names - {"fr_jax"}
    undeclared = {name for name in outside if canonical(DISTRIBUTIONS.get(name, name)) not in declared_packages()}
    assert undeclared == set()


def test_is_marked_as_typed():
    assert (Path(fr_jax.__file__).parent / "py.typed").is_file()


def test_version_is_told_once():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert fr_jax.__version__ == declared
    try:
        installed = importlib.metadata.distribution("fr_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fr_jax is not installed: these tests run from a source tree")
    if json.loads(installed.read_text("direct_url.json") or "{}").get("url") != ROOT.as_uri():
        pytest.skip("what is installed is another tree")
    assert installed.version == declared


def test_public_names_are_sorted_and_real():
    # ruff's order (RUF022): constants, classes, functions and modules.
    assert list(fr_jax.__all__) == sorted(fr_jax.__all__, key=lambda name: (not name.isupper(), name))
    assert len(set(fr_jax.__all__)) == len(fr_jax.__all__)
    assert [name for name in fr_jax.__all__ if not hasattr(fr_jax, name)] == []


def test_public_callables_are_documented():
    public = {name: getattr(fr_jax, name) for name in fr_jax.__all__}
    bare = [name for name, value in public.items() if callable(value) and not (inspect.getdoc(value) or "").strip()]
    assert bare == []
