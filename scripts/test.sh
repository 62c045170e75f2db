#!/usr/bin/env bash
# Set-up, lint, types, import contracts and tests. Arguments go to pytest: `-m slow` runs the tests that take minutes instead.
# `--quick`, as the first, runs the tests of parts that start no run.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen="not slow"
if [ "${1:-}" = --quick ]; then
    chosen=quick
    shift
else
    bash scripts/system_packages.sh & # while the rest is set up and checked
    trap 'kill $! 2>/dev/null || true' EXIT
fi
bash scripts/setup.sh dev
bash scripts/check.sh
wait
# Three processes for two cores, each computing on one thread: a quarter of the time they wait for what they have started.
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
pytest -m "$chosen" --dist loadgroup -n "$(python -c 'import os; print(min(8, max(1, 3 * (os.cpu_count() or 1) // 2)))')" "$@"
