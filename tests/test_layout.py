"""Imports go one way: scripts > sampling > training > eval > data, models > common. Modules have a name and tests."""
import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {"common": 0, "models": 1, "data": 1, "eval": 2, "training": 3, "sampling": 4, "scripts": 5}
# The paths of these two are published; they load checkpoints.
ENTRY_SCRIPTS = ("eval/eval_coordtok.py", "eval/eval_larp_tokenizer.py", "eval/reconstruct.py")
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


SCRIPTS = ("train_coordtok.py", "train_sit.py", "train_larp_tokenizer.py", "train_ar.py", "sample.py")


def windows(source: str, lines: int = 6) -> dict[str, int]:
    """{code: number of its first line} for each run of lines in a script's functions, without comments and blank
    lines. `parse_args` is left out: it is a list of calls."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    kept = {line for node in functions if node.name != "parse_args" for line in range(node.lineno, node.end_lineno + 1)}
    code = [(number, " ".join(line.split("#")[0].split())) for number, line in enumerate(source.splitlines(), 1)]
    code = [(number, line) for number, line in code if number in kept and line]
    return {"\n".join(line for _, line in code[i : i + lines]): code[i][0] for i in range(len(code) - lines + 1)}


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(SCRIPTS, 2)])
def test_no_six_lines_stand_in_two_entry_scripts(one, other):
    here, there = (windows((ROOT / script).read_text()) for script in (one, other))
    same = [f"{one}:{here[code]} and {other}:{there[code]} are equal:\n{code}" for code in here.keys() & there.keys()]
    assert not same, "\n".join(same)


def test_equal_lines_are_found():
    block = "".join(f"    x{i} = f({i})\n" for i in range(6))
    one, other = windows(f"def main():\n{block}"), windows(f"def main():\n    y = 1\n{block.replace(' = ', '  =  ')}")
    assert one.keys() & other.keys()


def test_every_module_has_a_test_file():
    """tests/test_MODULE.py, or another file of tests whose docstring names the module's path."""
    tests = {path.name: ast.get_docstring(ast.parse(path.read_text())) or "" for path in ROOT.glob("tests/test_*.py")}
    modules = [file for file in FILES if not file.startswith("scripts/") and not file.endswith("__init__.py")]
    assert not [file for file in modules if f"test_{Path(file).stem}.py" not in tests
                and not any(file in docstring for docstring in tests.values())]
