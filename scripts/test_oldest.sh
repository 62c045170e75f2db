#!/usr/bin/env bash
# Tests the oldest releases that pyproject.toml allows, in an environment of its own: .oldest/, or a folder named by OLDEST. Arguments go
# to pytest; without any, the quick tests run, and one small run in one process and one with strategy=fsdp in two.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${OLDEST:-.oldest}")
python=${PYTHON:-python3.11}

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
# Each lower bound of the project and its extras as an equality: "torch>=2.10" becomes "torch==2.10".
"$folder/bin/python" - >"$folder/oldest.txt" <<'PY'
import re
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *(line for name in extras if name not in ("all", "dev", "docs") for line in extras[name])]:
    name, version = re.match(r"([\w-]+)>=([\w.]+)", line).groups()
    print(f"{name}=={version}")
PY
pip="$folder/bin/python -m pip install --quiet --disable-pip-version-check"
PIP_CONSTRAINT="$folder/oldest.txt" $pip --editable ".[all]" pytest pytest-timeout pytest-xdist hypothesis psutil setuptools
"$folder/bin/python" -m pip list --format=freeze | grep -iF -f <(cut -d= -f1 "$folder/oldest.txt" | sed 's/$/==/')

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
if [ $# -gt 0 ]; then exec "$folder/bin/python" -m pytest "$@"; fi
"$folder/bin/python" -m pytest -m quick -p no:cacheprovider
shape='{model_type:llama,hidden_size:32,intermediate_size:48,num_hidden_layers:2,num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:128}'
for strategy in "strategy=single" "strategy=fsdp devices=2"; do
    # shellcheck disable=SC2086
    "$folder/bin/python" -m pretrain model=scratch "model.overrides=$shape" sequence_length=64 batch_size=2 max_steps=4 save_every=2 \
        evaluation.max_tokens=500 "output_dir=$(mktemp -d)/run" $strategy
done
