# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository's root and puts a Python that satisfies requirements.txt first on
# PATH: the active venv or conda environment where it does, otherwise .venv, made on first use. pip runs only where
# requirements.txt is another than the one that .venv was made from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# lacks PYTHON: the requirements that its environment does not meet; nothing where it meets all.
lacks() {
    "$1" - 2>&1 <<'END' || true
import sys
from importlib.metadata import PackageNotFoundError, version

if not (3, 10) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"Python 3.10 to 3.14 (it is {sys.version_info[0]}.{sys.version_info[1]})")
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("packaging")
for line in open("requirements.txt"):
    if not (line := line.partition("#")[0].strip()):
        continue
    need = Requirement(line)
    try:
        if (need.marker is None or need.marker.evaluate()) and version(need.name) not in need.specifier:
            print(f"{need.name}{need.specifier} (it has {version(need.name)})")
    except PackageNotFoundError:
        print(need.name)
END
}

ENVIRONMENT=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "$ENVIRONMENT" ] && [ "$ENVIRONMENT" != "$PWD/.venv" ]; then
    LACKS=$(lacks "$ENVIRONMENT/bin/python")
    if [ -n "$LACKS" ]; then
        echo "The active environment $ENVIRONMENT lacks ${LACKS//$'\n'/, }: .venv takes its place" >&2
        ENVIRONMENT=
    fi
else
    ENVIRONMENT=
fi
if [ -z "$ENVIRONMENT" ]; then
    ENVIRONMENT=$PWD/.venv
    if ! cmp -s requirements.txt .venv/installed; then  # what was installed, not when
        for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
            if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then break; fi
            python=
        done
        [ -n "$python" ] || { echo "error: Python 3.10 to 3.14 is needed; python3 here is $(python3 --version 2>&1)" >&2; exit 1; }
        echo "Setting up .venv with $("$python" --version): torch and its CUDA packages, about 6 GB"
        [ -x .venv/bin/pip ] || "$python" -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed
    fi
fi
export PATH="$ENVIRONMENT/bin:$PATH"

# gpu_count: the GPUs of this machine, as torch sees them.
gpu_count() { python -c "import torch; print(torch.cuda.device_count())"; }

# sampling_needs FOLDER: what sample.py needs for a report, looked for before training takes days: I3D's weights, and a
# place for the samples.
sampling_needs() {
    mkdir -p "$1"
    python - <<'END'
from common.cli import one_line_errors
from eval.i3d import I3D

with one_line_errors():
    I3D.from_weights()
END
}

# run_flags RESULTS NAME FLAGS...: what the flags given for training say to the next command. RUN_FOLDER is the run's
# folder, RESULTS/NAME unless the flags name another; SHARED_FLAGS are those of data, tokenizer and device.
run_flags() {
    local results=$1 name=$2 flag value
    shift 2
    SHARED_FLAGS=()
    while [ $# -gt 0 ]; do
        flag=${1%%=*} value=${2:-}
        if [[ $1 == *=* ]]; then value=${1#*=}; fi
        case ${flag//-/_} in
            __save_dir | __results_dir | __out_path) results=$value ;;
            __exp_name | __name) name=$value ;;
            __data_root | __video_name | __decode_timeout | __device | __num_workers | __num_frames | __img_size | \
                __padding | __enc_* | __dec_* | __latent_*) SHARED_FLAGS+=("$flag" "$value") ;;
        esac
        shift
    done
    # shellcheck disable=SC2034  # for the script that calls
    RUN_FOLDER=$results/$name
}
