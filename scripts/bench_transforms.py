"""Memory, speed and checkpoint size of training with transforms beside full training.

    OMP_NUM_THREADS=1 python scripts/bench_transforms.py [--steps 8] [--rounds 3] [words of the command line …]

Each row is `python -m pretrain` with random weights of the shape of SmolLM2-135M (30 blocks, width 576, without a download),
sequences of 256 tokens, AdamW, one process. The rows alternate: every round starts all of them once. Shown are the median of the
tokens per second over the steps after the second of all rounds, the same in processor seconds (on Linux; with one thread that
is the speed of an idle machine, even if this one is busy), the largest memory of the process, and the bytes of the last
checkpoint. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Run:
    """What a run has come to.

    Attributes:
        speeds: tokens per second of each step after the second.
        per_processor_second: tokens per processor second of these steps together.
        memory: the largest memory of the process, in GiB.
        checkpoint: bytes of the last checkpoint.
        parameters: number of parameters.
        trained: number of those that are trained.
    """

    speeds: list[float]
    per_processor_second: float
    memory: float
    checkpoint: int
    parameters: int
    trained: int


def run(words: list[str], folder: Path) -> Run:
    command = [sys.executable, "-m", "pretrain", *COMMON, *words, f"output_dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        used = watch(process.pid, folder / "metrics.jsonl")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {r["step"]: r for r in records if r["event"] == "train"}
    speeds = [r["tokens_per_second"] for step, r in steps.items() if step > 2]
    tokens, seconds = (of[max(steps)] - of[2] for of in ({s: r["tokens"] for s, r in steps.items()}, used))
    size = next(r["bytes"] for r in reversed(records) if r["event"] == "checkpoint")
    facts = json.loads((folder / "run.json").read_text())
    memory = usage.ru_maxrss / 2**20
    return Run(speeds, tokens / seconds, memory, size, facts["parameters"], facts["trained_parameters"])


def watch(pid: int, metrics: Path) -> dict[int, float]:
    """Return the processor seconds that a process has used when each step was recorded, by step. Returns when it has ended."""
    used: dict[int, float] = {}
    while True:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":
            return used
        step = metrics.read_bytes().count(b'"event": "train"') if metrics.exists() else 0
        used.setdefault(step, sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"))
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=ROWS)
    given, words = parser.parse_known_args()
    found: dict[str, list[Run]] = {name: [] for name in given.only or ROWS}
    for _ in range(given.rounds):
        for name, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(run([f"max_steps={given.steps}", *ROWS[name], *words], Path(folder) / "run"))
            print(name, runs[-1], file=sys.stderr, flush=True)
    print("| | trained parameters | tokens/s | per processor second | memory | checkpoint |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        speed = statistics.median(value for r in runs for value in r.speeds)
        per_second = statistics.median(r.per_processor_second for r in runs)
        one, memory = runs[0], max(r.memory for r in runs)
        print(
            f"| {name} | {one.trained:,} ({one.trained / one.parameters:.1%}) | {speed:,.0f} | {per_second:,.0f} | "
            f"{memory:.2f} GiB | {one.checkpoint / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    main()
