"""README.md and docs/: examples run, links lead somewhere, commands have no flag that their script lacks, and each
command is run by a test, or marked with what it needs (`<!-- needs a GPU -->` before its block)."""
import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers import ROOT, environment

PAGES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
         if path.exists()]
FENCE = re.compile(r"(?:<!-- (needs [^>]*) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
OTHERS = {  # flags of torchrun, sbatch, docker and pip, not of this project
    "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--nodes", "--shm-size", "--standalone",
}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(page: Path) -> Iterator[tuple[str | None, str]]:
    """(what it needs, command) of each line of the page's bash blocks; needs is None where nothing is."""
    for needs, language, content in FENCE.findall(page.read_text()):
        if language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                for part in line.split(" #")[0].split(" && "):
                    if part.strip() and not part.startswith("#"):
                        yield needs or None, part.strip()


def target(command: str) -> str | None:
    """The file or module of this project that a command runs; None for pip, cd and others."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_0-9]+=", word)]
    if words[0] == "cd":
        return None
    for flag, word in zip(["", *words], words):
        if flag == "-m" and word.split(".")[0] in ("eval", "training", "scripts", "tests", "data"):
            return word
        if word.endswith((".py", ".sh", ".sbatch")) and not word.startswith("-") and words[0] not in ("cp", "cat"):
            return word
    return None


@functools.cache
def flags_of(name: str) -> frozenset[str]:
    """All flags that a script's help shows, in underscores. A bash script has those of the script that it runs."""
    path = ROOT / name
    if name.endswith((".sh", ".sbatch")):
        inner = re.findall(r"(?<![\w/])((?:scripts/|eval/)?\w+\.py)\b", path.read_text())
        return flags_of(inner[0]) if inner else frozenset()
    path = path if path.exists() else ROOT / "data" / name  # split_ucf.py is run in data/
    for flag in ("--help_all", "--help"):  # in this process: importing torch anew for each script takes long
        said = io.StringIO()
        with mock.patch("sys.argv", [str(path), flag]), contextlib.redirect_stdout(said), \
                contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit) as end:
            if name.endswith(".py"):
                runpy.run_path(str(path), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__")
        if not end.value.code:
            return frozenset(found.replace("-", "_") for found in re.findall(r"--\w[\w-]*", said.getvalue()))
    raise AssertionError(f"{name} has no help")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_have_no_flag_that_their_script_lacks(page):
    for _, command in commands(page):
        name = target(command)
        if name is None or name.endswith(".sbatch"):  # sbatch's own flags stand before, those of any script behind
            continue
        known = flags_of(name)
        for word in shlex.split(command.split(name, 1)[1]):
            if word.startswith("--") and known:
                assert word.split("=")[0].replace("-", "_") in known, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_in_the_text_exist(page):
    text = FENCE.sub("", page.read_text())
    spans = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    scripts = {target(command) for each in PAGES for _, command in commands(each)}
    scripts |= {target(code) for code in spans if code.startswith(("python ", "bash "))}
    known = {flag.replace("-", "_") for flag in OTHERS}.union(*(flags_of(name) for name in scripts if name))
    named = {flag for code in spans for flag in re.findall(r"(?<!\S)--\w[\w-]*", code)}
    assert {flag for flag in named if flag.replace("-", "_") not in known} == set()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_each_command_is_run_by_a_test_or_marked(page):
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py") if path.name != "test_docs.py")
    for needs, command in commands(page):
        name = target(command)
        if name and not needs:
            stem = Path(name).stem if name.endswith((".py", ".sh")) else name
            words = (name, stem, *((f"from {name.rpartition('.')[0]} import",) if "." in stem else ()))
            assert any(word in tests for word in words), f"{page.name}: no test runs {command}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_pages_are_short():
    for page in PAGES:
        lines = page.read_text().count("\n")
        assert lines <= (110 if page.name == "README.md" else 150), f"{page.name} has {lines} lines"


def examples() -> list[str]:
    text = (ROOT / "docs" / "extending.md").read_text()
    return [content for _, language, content in FENCE.findall(text) if language == "python"]


@pytest.mark.parametrize("code", examples(), ids=["metric", "protocol", "dataset"])
def test_examples_of_extending_run(code):
    """In a process of its own each, as they add to tables of the project."""
    assert code.count("\n") < 40
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
