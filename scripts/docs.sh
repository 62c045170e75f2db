#!/usr/bin/env bash
# The documentation site in site/, made of README.md, docs/ and the docstrings of the public names. A broken link fails the build.
# Arguments go to sphinx-build: `-E -a` makes every page again.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh docs
.venv/bin/python -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs --doctree-dir site/.doctrees "$@" . site
echo "site/index.html"
