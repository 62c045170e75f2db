#!/usr/bin/env bash
# Set-up, lint, types, import contracts and tests. Arguments go to pytest: `-m slow` runs the tests that take minutes instead.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
# One process a core, each computing on one thread.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false pytest -m "not slow" --dist loadgroup -n "$(python -c 'import os; print(min(8, os.cpu_count() or 1))')" "$@"
