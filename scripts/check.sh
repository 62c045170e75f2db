#!/usr/bin/env bash
# What takes seconds and needs no test: lint, format, types, import contracts. scripts/test.sh runs it first; CONTRIBUTING.md makes it a
# hook of git.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
