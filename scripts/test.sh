#!/usr/bin/env bash
# Set-up, lint, types, import contracts and tests. Arguments go to pytest: `-m slow` runs the tests that take minutes instead.
# `--quick`, as the first, runs the tests of parts that start no run.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
bash scripts/check.sh
chosen="not slow"
if [ "${1:-}" = --quick ]; then
    chosen=quick
    shift
fi
# One process a core, each computing on one thread.
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
pytest -m "$chosen" --dist loadgroup -n "$(python -c 'import os; print(min(8, os.cpu_count() or 1))')" "$@"
