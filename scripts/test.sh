#!/usr/bin/env bash
# Lint, types and tests, in two processes; makes .venv on first use. Arguments go to pytest:
#   bash scripts/test.sh tests/test_fvd.py
source "$(dirname "$0")/setup.sh"
if ! cmp -s requirements-dev.txt .venv/installed-dev; then
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
    cp requirements-dev.txt .venv/installed-dev
fi
ruff check .
mypy
if command -v shellcheck >/dev/null; then
    shellcheck scripts/*.sh scripts/benchmarks/*.sh scripts/slurm/*.sbatch .ci/run
else
    echo "shellcheck is not here (requirements-dev.txt): the bash scripts go unchecked"
fi
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
