#!/usr/bin/env bash
# Lint and tests; makes .venv on first use. Arguments go to pytest: bash scripts/test.sh tests/test_fvd.py
source "$(dirname "$0")/setup.sh"
ruff check .
python -m pytest "$@"
