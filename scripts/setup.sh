# Sourced by the other scripts: goes to the repository's root and puts .venv first on PATH, making it on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -f .venv/installed ] || [ requirements.txt -nt .venv/installed ]; then
    for python in python3 python3.12 python3.11 python3.10; do
        if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then break; fi
        python=
    done
    [ -n "$python" ] || { echo "error: Python 3.10, 3.11 or 3.12 is needed; python3 here is $(python3 --version 2>&1)" >&2; exit 1; }
    echo "Setting up .venv with $("$python" --version): torch and its CUDA packages, about 6 GB"
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
    touch .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
