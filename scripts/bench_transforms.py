"""Memory, speed and checkpoint size of training with transforms beside full training.

    OMP_NUM_THREADS=2 python scripts/bench_transforms.py [--steps 8] [--rounds 3] [words of the command line …]

Each row is `python -m pretrain` with random weights of the shape of SmolLM2-135M (30 blocks, width 576, without a download),
sequences of 256 tokens, AdamW, one process. The rows alternate: every round starts all of them once. Shown are medians over the
steps after the second of all rounds, the largest memory of the process, and the bytes of the last checkpoint. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = (
    "model.overrides={model_type: llama, hidden_size: 576, intermediate_size: 1536, num_hidden_layers: 30, "
    "num_attention_heads: 9, num_key_value_heads: 3, vocab_size: 49152, tie_word_embeddings: true}"
)
COMMON = [
    "model=scratch",
    SHAPE,
    "sequence_length=256",
    "batch_size=2",
    "log_every=1",
    "evaluate_every=null",
    "save_every=null",
]
COMMON += [
    "evaluation=new_only",
    "evaluation.max_tokens=512",
    "evaluation.samples=0",
    "sink=[jsonl]",
    "checkpoint.export=never",
]
ROWS = {
    "full": [],
    "lora, rank 16": ["transform=[lora]"],
    "dora, rank 16": ["transform=[lora]", "transform.lora.dora=true"],
    "freeze: only the last 10 blocks": ["transform=[freeze]", "transform.freeze.trainable='layers\\.2'"],
    "expand, 4 blocks": ["transform=[expand]", "transform.expand.blocks=4"],
    "vocabulary, 64 tokens, only new rows": [
        *("transform=[vocabulary]", "transform.vocabulary.size=64", "transform.vocabulary.only_new_rows=true"),
    ],
}


def run(words: list[str], folder: Path) -> tuple[list[float], float, int, dict[str, int]]:
    """Return tokens per second of each step, the largest memory in GiB, bytes of the checkpoint, and counts of parameters."""
    command = [sys.executable, "-m", "pretrain", *COMMON, *words, f"output_dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = _wait(process)
    if status:
        raise SystemExit(f"failed: {' '.join(words)}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [r["tokens_per_second"] for r in records if r["event"] == "train" and r["step"] > 2]
    size = next(r["bytes"] for r in reversed(records) if r["event"] == "checkpoint")
    facts = json.loads((folder / "run.json").read_text())
    return speeds, usage.ru_maxrss / 2**20, size, {k: facts[k] for k in ("parameters", "trained_parameters")}


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int, resource.struct_rusage]:
    import os

    found = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(found[1])
    return found[0], process.returncode, found[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=ROWS)
    given, words = parser.parse_known_args()
    found: dict[str, list[tuple[list[float], float, int, dict[str, int]]]] = {name: [] for name in given.only or ROWS}
    for _ in range(given.rounds):
        for name in found:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(run([f"max_steps={given.steps}", *ROWS[name], *words], Path(folder) / "run"))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    print("| | trained parameters | tokens/s | memory | checkpoint |\n|---|---|---|---|---|")
    for name, runs in found.items():
        counts = runs[0][3]
        speed = statistics.median(value for speeds, *_ in runs for value in speeds)
        share = counts["trained_parameters"] / counts["parameters"]
        print(
            f"| {name} | {counts['trained_parameters']:,} ({share:.1%}) | {speed:,.0f} | {max(r[1] for r in runs):.2f} GiB | "
            f"{runs[0][2] / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    main()
