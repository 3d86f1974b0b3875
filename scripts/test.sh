#!/usr/bin/env bash
# Lint and tests; makes .venv on first use. Arguments go to pytest: bash scripts/test.sh tests/test_fvd.py
source "$(dirname "$0")/setup.sh"
ruff check .
if command -v shellcheck >/dev/null; then
    shellcheck scripts/*.sh scripts/slurm/*.sbatch .ci/run
else
    echo "shellcheck is not here (requirements.txt): the bash scripts go unchecked"
fi
python -m pytest "$@"
