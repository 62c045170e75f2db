#!/usr/bin/env bash
# Set-up and the main job in one: a small English model continues its pretraining on Python. Arguments go to the run.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh all
exec .venv/bin/python -m pretrain "$@"
