"""A process that has imported PyTorch and waits for scripts to run, each in a fork of itself, which starts faster.

Standard input has a line of JSON a script: {"argv": the command line after `python`, "cwd", "environ", "out": the files
of its standard output and error}. Standard output gets a line: the exit code, as subprocess gives it.
"""
import json
import os
import runpy
import sys

import scipy.integrate  # noqa: F401
import torchvision  # noqa: F401  # and torch._dynamo with it
import wandb  # noqa: F401  # as timm does


def become(job: dict) -> None:
    """Run the script in this process, as the `python` of its command line would."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"])
    for number, path in enumerate([os.devnull, *job["out"]]):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    name, *flags = job["argv"]
    if name == "-m":
        sys.path[0], sys.argv = job["cwd"], flags
        runpy.run_module(flags[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(name)), [name, *flags]
        runpy.run_path(name, run_name="__main__")


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
            return  # it ends as a script does: with its threads joined, and what is registered for its end called
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
