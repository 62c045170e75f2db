#!/usr/bin/env bash
# Makes .venv and installs the project with one extra (`all`, `dev` or `docs`); does nothing when that is already so.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-all}

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; '$python' is $("$python" --version 2>&1 || true). Set PYTHON=/path/to/python3.11." >&2
    exit 2
fi
want=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
marks=(".venv/.installed-$extra")
if [ "$extra" = all ]; then marks+=(.venv/.installed-dev); fi # dev contains all
for done in "${marks[@]}"; do
    if [ -f "$done" ] && [ "$(cat "$done")" = "$want" ]; then exit 0; fi
done
if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || {
        echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 2
    }
fi
echo "Installing pretrain[$extra] into .venv (a few minutes the first time) ..." >&2
# Constraints also hold for what build environments install, so that nothing floats.
PIP_CONSTRAINT=$PWD/constraints.txt .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
echo "$want" > ".venv/.installed-$extra"
