"""The files about the repository itself say what is true of it: workflow, citation, changelog, contributing."""
import re
import shlex

import pytest
import yaml
from helpers import ROOT

# What GitHub accepts: https://docs.github.com/actions/reference/workflow-syntax-for-github-actions
WORKFLOW = {"name", "run-name", "on", "permissions", "env", "defaults", "concurrency", "jobs"}
JOB = {"name", "permissions", "needs", "if", "runs-on", "environment", "concurrency", "outputs", "env", "defaults",
       "steps", "timeout-minutes", "strategy", "continue-on-error", "container", "services", "uses", "with", "secrets"}
STEP = {"id", "if", "name", "uses", "run", "working-directory", "shell", "with", "env", "continue-on-error",
        "timeout-minutes"}


def test_the_workflow_runs_the_tests_on_the_oldest_and_newest_python():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    workflow = yaml.load(text, yaml.BaseLoader)  # as GitHub reads it: `on` is a name, 3.10 is text
    assert workflow.keys() <= WORKFLOW and {"push", "pull_request"} == workflow["on"].keys()
    (job,) = workflow["jobs"].values()
    assert job.keys() <= JOB and job["runs-on"].startswith("ubuntu-") and int(job["timeout-minutes"]) > 0
    assert job["strategy"]["matrix"] == {"python": ["3.10", "3.14"]}
    for step in job["steps"]:
        assert step.keys() <= STEP and ("uses" in step) != ("run" in step)
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash scripts/test.sh"]
    used = {step["uses"].partition("@")[0]: step.get("with", {}) for step in job["steps"] if "uses" in step}
    assert used["actions/setup-python"]["python-version"] == "${{ matrix.python }}"
    assert list(used)[0] == "actions/checkout"
    for expression in re.findall(r"\$\{\{(.*?)\}\}", text):
        for file in re.findall(r"'([^']+)'", expression):
            assert (ROOT / file).is_file()
    assert list(ROOT.glob(used["actions/setup-python"]["cache-dependency-path"]))


def test_the_citation_is_whole_and_of_the_newest_version():
    """What CFF 1.2.0 requires, and what README says of the papers."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation.keys() >= {"message", "title", "authors"}
    assert citation["license"] == "MIT" and "MIT License" in (ROOT / "LICENSE").read_text()
    newest = re.search(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest.groups() == (citation["version"], str(citation["date-released"]))
    readme = (ROOT / "README.md").read_text()
    for paper in citation["references"]:
        assert paper.keys() >= {"type", "title", "authors"} and paper["url"] in readme
        assert all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])
    titles = {paper["title"] for paper in citation["references"]}
    assert titles >= {"Efficient Long Video Tokenization via Coordinate-based Patch Reconstruction",
                      "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior"}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "tests/reference/README.md"])
def test_files_that_a_page_names_are_there(page):
    """In links, in backticks with a slash, and in commands."""
    text = (ROOT / page).read_text()
    named = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named += [name for name in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if not name.startswith("../")]
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            named += [word for word in words if word.endswith((".sh", ".py"))]
            named += [after.replace(".", "/") + ".py" for word, after in zip(words, words[1:]) if word == "-m"]
    assert named or page == "CHANGELOG.md"
    home = (ROOT / page).parent
    missing = [name for name in named if not (ROOT / name).exists() and not (home / name).exists()]
    assert not missing
