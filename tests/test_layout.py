"""Imports go one way: scripts > sampling > training > eval > data, models > common. Modules have a name and tests."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {"common": 0, "models": 1, "data": 1, "eval": 2, "training": 3, "sampling": 4, "scripts": 5}
# The paths of these two are published; they load checkpoints.
ENTRY_SCRIPTS = ("eval/eval_coordtok.py", "eval/eval_larp_tokenizer.py")
FILES = [path.relative_to(ROOT).as_posix() for folder in LEVELS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(source: str) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    folder = file.split("/")[0]
    level = LEVELS["sampling"] if file in ENTRY_SCRIPTS else LEVELS[folder]
    up = {name for name in imported((ROOT / file).read_text()) & LEVELS.keys() - {folder} if LEVELS[name] >= level}
    assert not up, f"{file} imports {', '.join(sorted(up))}"


def test_every_module_has_one_home():
    """No two packages have a module of one name, but for the generators, which are models and are sampled from."""
    names = [Path(file).stem for file in FILES if not file.startswith("scripts/") and Path(file).stem != "__init__"]
    assert {name for name in names if names.count(name) > 1} <= {"sit"}


def test_every_module_has_a_test_file():
    """tests/test_MODULE.py, or another file of tests whose docstring names the module's path."""
    tests = {path.name: ast.get_docstring(ast.parse(path.read_text())) or "" for path in ROOT.glob("tests/test_*.py")}
    modules = [file for file in FILES if not file.startswith("scripts/") and not file.endswith("__init__.py")]
    assert not [file for file in modules if f"test_{Path(file).stem}.py" not in tests
                and not any(file in docstring for docstring in tests.values())]
