#!/usr/bin/env bash
# Everything that wants a GPU, in one call of eight minutes: the GPU's tests, then all benchmarks at the published sizes.
#   bash scripts/benchmarks/gpu_session.sh FOLDER [SECONDS]
# FOLDER gets the tests' output, each benchmark's rows (history.csv), tables (RESULTS.md) and pictures. Needs no network
# and sets up nothing: it runs with the python on PATH, which needs this repository's requirements.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
folder=${1:?give the folder for what it writes}
seconds=${2:-480}
mkdir -p "$folder"
started=$SECONDS
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
python3 -m pytest -p no:cacheprovider --durations=8 -m gpu tests > "$folder/tests.txt" 2>&1 &
tests=$!
( sleep $((seconds * 2 / 5)); kill "$tests" 2>/dev/null ) &
wait "$tests"
tail -n 40 "$folder/tests.txt"
python3 -m scripts.benchmarks.run_all --budget $((seconds - SECONDS + started)) --folder "$folder"
