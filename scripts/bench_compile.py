"""What compiling costs at the start of a run: block by block, as one graph, and with the code that an earlier start has kept.

    OMP_NUM_THREADS=1 python scripts/bench_compile.py [--rounds 1] [--steps 4] [--layers 12] [words of the command line …]

Each row is `python -m pretrain` with a Llama of random weights (width 256, vocabulary 32,000), bf16-mixed, in a process of its
own. Rows alternate. Shown are medians: the seconds of the first step and of later ones, those from the command to step 3, the
processor seconds of the command with all compilers that it starts, and how many of these are more than those of the eager run.
`kept` is the same command again with the compiled code of the row before. One compiler runs at a time
(`TORCHINDUCTOR_COMPILE_THREADS=1`), so that its time is counted with that of the command. Prints a Markdown table.
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

ROWS = {"eager": "false", "blocks": "true", "blocks, kept": "true", "graph": "graph", "graph, kept": "graph"}
REACHED = 3  # the step up to which the start is timed


@dataclass(frozen=True)
class Start:
    """One command: seconds of its first and of its later steps, from the command to step 3, and of the processor."""

    first: float
    later: float
    reached: float
    processor: float


def command(layers: int, steps: int, compiled: str, folder: Path, words: list[str]) -> list[str]:
    shape = (
        f"model.overrides={{model_type: llama, hidden_size: 256, intermediate_size: 768, num_hidden_layers: {layers}, "
        "num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 32000, tie_word_embeddings: true}"
    )
    return [
        *(
            sys.executable,
            "-m",
            "pretrain",
            f"output_dir={folder / 'run'}",
            "model=scratch",
            shape,
            "precision=bf16-mixed",
        ),
        *(f"model.compile={compiled}", "sequence_length=512", "batch_size=2", "gradient_accumulation_steps=2"),
        *(f"max_steps={steps}", "log_every=1", "evaluate_every=null", "save_every=null", "evaluation=new_only"),
        *("evaluation.max_tokens=512", "evaluation.samples=0", "sink=[jsonl]", "checkpoint.export=never", *words),
    ]


def start(words: list[str], folder: Path, code: Path) -> Start:
    """Run a command, whose compiled code is kept in ``code``."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(code), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    log = folder / "log"
    began = time.time()
    with log.open("w") as out:
        child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=os.environ | own)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words)}\n{log.read_text()[-2000:]}")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "train"]
    seconds = [record["step_seconds"] for record in steps]
    later = statistics.median(seconds[1:])
    return Start(seconds[0], later, steps[REACHED - 1]["time"] - began, usage.ru_utime + usage.ru_stime)


def table(found: dict[str, list[Start]]) -> None:
    def median(name: str, value: str) -> float:
        return statistics.median(getattr(one, value) for one in found[name])

    print("| | first step s | later step s | command to step 3 s | processor s | more than eager | × graph |")
    print("|---|---|---|---|---|---|---|")
    eager = median("eager", "processor")
    for name in found:
        more = median(name, "processor") - eager
        against = "graph, kept" if name.endswith("kept") else "graph"
        ratio = f"{more / (median(against, 'processor') - eager):.2f}" if name != "eager" else ""
        times = " | ".join(f"{median(name, value):.1f}" for value in ("first", "later", "reached", "processor"))
        print(f"| {name} | {times} | {more:.1f} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="starts of each row")
    parser.add_argument("--steps", type=int, default=4, help=f"steps of a start, at least {REACHED}")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    given, words = parser.parse_known_args()
    found: dict[str, list[Start]] = {name: [] for name in ROWS}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as name:
            for number, (row, compiled) in enumerate(ROWS.items()):
                folder = Path(name, str(number))
                folder.mkdir()
                code = Path(name, f"code-{compiled}")
                code.mkdir(0o700, exist_ok=True)
                steps = max(REACHED, given.steps)
                found[row].append(start(command(given.layers, steps, compiled, folder, words), folder, code))
                print(row, found[row][-1], file=sys.stderr, flush=True)
    table(found)


if __name__ == "__main__":
    main()
