"""tests/fake_cuda_steps.py, in a process of its own: autograd counts the devices in its first backward pass, and in a
process that has run other tests it knows of no GPU."""
import subprocess
import sys

import pytest
from fake_cuda import unavailable
from helpers import ROOT, environment


def test_steps_on_fake_cuda():
    if reason := unavailable():
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fake_cuda_steps.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "skipped" not in done.stdout
