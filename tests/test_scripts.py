"""The bash scripts, with programs in place of python, torchrun and pip that note their arguments."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, environment

from scripts import make_assets

# env printf writes all of a call at once, the shell's own a line at a time: calls may be made side by side.
STUB = """#!/usr/bin/env bash
env printf '%s\\n' "${0##*/}" "$@" '' >>"$CALLS"
case "$*" in *device_count*) echo 0 ;; esac
"""


def no_environment() -> dict[str, str]:
    """As in a shell where no environment is active."""
    return {name: value for name, value in environment().items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}


def test_pictures_are_of_a_quickstart(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_assets.py", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="run is no run of the quickstart, for lack of coordtok_second, "):
        make_assets.main()
    assert not (tmp_path / "out").exists()


class Repository:
    """A copy of the scripts, in a folder whose name has a space and a *."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        for name in ("requirements.txt", "requirements-dev.txt", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        (folder / "data").mkdir()
        self.make_venv()

    def make_venv(self) -> None:
        bin_folder = self.folder / ".venv" / "bin"
        bin_folder.mkdir(parents=True)
        for name in ("python", "python3", "torchrun", "pip", "ruff", "mypy", "shellcheck"):
            (bin_folder / name).write_text(STUB)
            (bin_folder / name).chmod(0o755)
        shutil.copy(self.folder / "requirements.txt", self.folder / ".venv" / "installed")

    def run(self, script: str, *flags: str, **variables: str) -> list[list[str]]:
        """The calls that a script makes, each with its arguments. No nvidia-smi is on PATH."""
        calls = self.folder / "calls"
        calls.unlink(missing_ok=True)
        path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep)
                               if not os.path.exists(os.path.join(part, "nvidia-smi")))
        done = subprocess.run(["bash", f"scripts/{script}", *flags], cwd=self.folder, capture_output=True, text=True,
                              env={**no_environment(), "PATH": path, "CALLS": str(calls), **variables})
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stderr
        blocks = calls.read_text().split("\n\n")[:-1] if calls.exists() else []
        return [block.split("\n") for block in blocks]


@pytest.fixture
def repository(tmp_path) -> Repository:
    folder = tmp_path / "a b*"
    folder.mkdir()
    (tmp_path / "a bc").mkdir()  # what the * would stand for
    return Repository(folder)


def value(call: list[str], flag: str) -> str:
    """Of a flag; the last one given wins."""
    return call[len(call) - call[::-1].index(flag)]


def test_pip_runs_only_where_the_requirements_changed(repository):
    os.utime(repository.folder / "requirements.txt")  # as a checkout does
    assert repository.run("setup.sh") == []
    (repository.folder / "requirements.txt").write_text("torch\n")
    assert [call[:2] for call in repository.run("setup.sh")] == [["pip", "install"]]
    assert repository.run("setup.sh") == []


def test_only_the_tests_install_development_dependencies(repository):
    calls = repository.run("test.sh", "tests/test_fvd.py")
    assert [call[0] for call in calls] == ["pip", "ruff", "mypy", "shellcheck", "python"]
    assert calls[0][1] == "install" and calls[0][-1] == "requirements-dev.txt" and calls[-1][-1] == "tests/test_fvd.py"
    assert [call[0] for call in repository.run("test.sh")] == ["ruff", "mypy", "shellcheck", "python"]


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_serves_where_it_meets_the_requirements(repository, tmp_path, variable):
    """The interpreter that runs this test stands in for it; its torchrun tells which environment is used."""
    active = tmp_path / "active" / "bin"
    active.mkdir(parents=True)
    (active / "python").write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    (active / "torchrun").write_text(STUB.replace("${0##*/}", "active"))
    for program in active.iterdir():
        program.chmod(0o755)
    shutil.rmtree(repository.folder / ".venv")
    flags = {variable: str(active.parent), "GPUS": "1"}
    (repository.folder / "requirements.txt").write_text("pytest>=1  # there\nno; python_version < '3'\n\n# none\n")
    assert [call[0] for call in repository.run("sample_parallel.sh", **flags)] == ["active"]
    assert not repository.said and not (repository.folder / ".venv").exists()

    repository.make_venv()
    (repository.folder / "requirements.txt").write_text("pytest>=1000\nnot-here\n")
    calls = repository.run("sample_parallel.sh", **flags)
    assert [call[0] for call in calls] == ["pip", "torchrun"]
    assert f"{active.parent} lacks pytest>=1000 (it has {pytest.__version__}), not-here: .venv" in repository.said
    assert [call[0] for call in repository.run("sample_parallel.sh", **flags)] == ["torchrun"]


@pytest.mark.parametrize(("version", "right"), [("(3, 9)", False), ("(3, 10)", True), ("(3, 14)", True),
                                                ("(3, 15)", False)])
def test_which_python(repository, tmp_path, version, right):
    """With pythons that claim to be of one version."""
    (repository.folder / ".venv" / "installed").unlink()
    claim = f"import sys; sys.version_info = {version}; exec(sys.argv[2] if len(sys.argv) > 2 else '')"
    (tmp_path / "bin").mkdir()
    for name in ("python3", *(f"python3.{minor}" for minor in range(10, 15))):
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{claim}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=repository.folder, capture_output=True, text=True,
                          env={**no_environment(), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CALLS": "/dev/null"})
    assert (done.returncode == 0) == right, done.stderr
    assert right or done.stderr.startswith("error: Python 3.10 to 3.14 is needed; python3 here is ")


def test_sampling_without_a_gpu_runs_one_process(repository):
    flags = ["--output_dir", "an out*"]
    assert repository.run("sample_parallel.sh", *flags)[-1] == [
        "torchrun", "--standalone", "--nproc_per_node=1", "sample.py", *flags]
    assert "--nproc_per_node=3" in repository.run("sample_parallel.sh", *flags, GPUS="3")[-1]
    sent = repository.run("slurm/sample.sbatch", *flags, SLURM_SUBMIT_DIR=str(repository.folder),
                          SLURM_ARRAY_TASK_ID="1", TOTAL="10", SHARDS="4")[-1]
    assert sent[2:] == ["--nproc_per_node=1", "sample.py", "--num_samples_total", "10", "--num_samples", "3",
                        "--starting_index", "3", *flags]


def test_training_on_nodes_takes_the_gpus_that_torch_or_slurm_counts(repository):
    for name in ("srun", "scontrol"):
        (repository.folder / ".venv" / "bin" / name).write_text(STUB)
        (repository.folder / ".venv" / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(repository.folder), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7",
             "SLURM_JOB_NODELIST": "n[1-2]"}
    for given, processes in (({}, 1), ({"SLURM_GPUS_ON_NODE": "8"}, 8), ({"GPUS": "3", "SLURM_GPUS_ON_NODE": "8"}, 3)):
        call = repository.run("slurm/train.sbatch", "train_sit.py", "--seed", "5", **slurm, **given)[-1]
        assert call[:4] == ["srun", "torchrun", "--nnodes=2", f"--nproc_per_node={processes}"]
        assert call[-5:] == ["train_sit.py", "--resume", "auto", "--seed", "5"]


def test_paths_with_spaces_and_stars(repository):
    odd = f"{repository.folder}/data *"
    _, one, two = repository.run("train_coordtok.sh", DATA_ROOT=odd, RUN="r *")
    assert value(one, "--data_root") == value(two, "--data_root") == odd
    assert value(two, "--first_step_ckpt") == "logs/r *_step1_1M/checkpoints"
    _, train, sample = repository.run("train_sit.sh", DATA_ROOT=odd, CKPT="c *", RUN="r *")
    assert value(train, "--data_root") == value(sample, "--data_root") == odd
    assert value(train, "--first_model_ckpt") == value(sample, "--first_model_ckpt") == "c *"
    assert value(sample, "--sit_model") == "results/r *"
    calls = repository.run("quickstart.sh", OUT=odd)
    folders = [value(call, flag) for call in calls for flag in ("--save_dir", "--output_dir") if flag in call]
    assert len(folders) == 11 and all(folder == odd or folder.startswith(f"{odd}/") for folder in folders)
    assert ["python", "scripts/report.py", odd] in calls


@pytest.mark.parametrize("wrong", [{"CLIPS": "1"}, {"CLIPS": "x"}, {"STEPS": "0"}])
def test_the_quickstart_names_a_wrong_number_before_it_starts(repository, wrong):
    with pytest.raises(AssertionError, match="error: STEPS is .* and CLIPS .*, expected whole numbers, at"):
        repository.run("quickstart.sh", **wrong)
    assert not (repository.folder / "calls").exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_stopping_the_quickstart_stops_both_halves(repository, sent):
    """And waits for them: training saves before it ends."""
    python, folder = repository.folder / ".venv" / "bin" / "python", repository.folder
    python.write_text(STUB + """case "$1" in train_*)
trap 'sleep 1; echo saved >>"$CALLS.ends"; exit 9' TERM INT
echo started >>"$CALLS.ends"
while true; do sleep 0.1; done
esac
""")
    ends = folder / "calls.ends"
    quickstart = subprocess.Popen(
        ["bash", "scripts/quickstart.sh"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**no_environment(), "CALLS": str(folder / "calls")}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    until = time.monotonic() + 60
    while (ends.read_text() if ends.exists() else "").count("started") < 2:
        assert time.monotonic() < until and quickstart.poll() is None
        time.sleep(0.1)
    quickstart.send_signal(sent)
    assert quickstart.wait(60) == 128 + sent
    assert ends.read_text().count("saved") == 2


def test_flags_of_training_reach_what_follows(repository):
    flags = ["--video-name", "V", "--results_dir=out *", "--exp_name", "mine", "--enc_num_layers", "2", "--lr", "1",
             "--seed", "5"]
    for script in ("train_sit.sh", "train_sit_reproduce.sh"):
        _, train, sample = repository.run(script, *flags, CKPT="c", DATA_ROOT="d")
        assert train[-len(flags):] == flags
        assert value(sample, "--sit_model") == "out */mine" and value(sample, "--output_dir") == "samples/mine"
        assert value(sample, "--video-name") == "V" and value(sample, "--enc_num_layers") == "2"
        assert "--lr" not in sample and "--seed" not in sample and value(sample, "--data_root") == "d"
    for script in ("train_coordtok.sh", "train_coordtok_reproduce.sh"):
        _, _, two = repository.run(script, "--save-dir", "out", "--exp_name=mine")
        assert value(two, "--first_step_ckpt") == "out/mine/checkpoints"


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("train_*.sh")))
def test_what_a_later_step_needs_is_looked_for_before_the_first(repository, script):
    """Step 2's flags and LPIPS's weights, and I3D's weights to measure samples; nothing is trained where it fails."""
    calls = repository.run(script, CKPT="c")
    first, *later = [call for call in calls if call[0] == "torchrun"]
    assert bool(later) == (calls[0][0] == "python")
    if not later:
        return
    if "--is_second_step" in later[0]:
        assert calls[0] == ["python", *later[0][3:], "--check"]
    else:
        assert calls[0] == ["python", "-"] and (repository.folder / value(later[0], "--output_dir")).is_dir()
    python = repository.folder / ".venv" / "bin" / "python"
    python.write_text(STUB + "exit 1\n")
    with pytest.raises(AssertionError):
        repository.run(script, CKPT="c")
    assert "torchrun" not in (repository.folder / "calls").read_text()
