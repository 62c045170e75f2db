"""Everything that is measured on one GPU, in one command: this program, a bare Hugging Face loop, the Trainer and torchtitan.

    python scripts/bench_gpu.py --budget 480 --out bench_gpu.json
    python scripts/bench_gpu.py --tiny                # the same rows with tiny models on a CPU: whether each of them runs

Two Llamas with random weights and random tokens (vocabulary 50,304, head not tied): 162 M with 32 × 1024 tokens a step and
1.18 B with 8 × 2048; bf16-mixed, fused AdamW, clipping. Each row is a process of its own, and is printed when it ends: tokens/s
(median of windows of five steps, the first two not counted), MFU (causal attention counted once, none for 8-bit products), peak
GiB, and seconds from the command to step 30. The most telling rows come first, rows for which the budget does not suffice are
skipped, and the JSON is written again after each. A row that fails is printed with the end of its output; the others follow.

A bare machine that has Python and torch alone, and no network, needs these wheels (`pip download` with its Python on another
machine, `pip install --no-index --no-deps` there): hydra-core, omegaconf, antlr4-python3-runtime, pydantic, pydantic-core,
annotated-types, typing-inspection, datasets, dill, multiprocess, pyarrow, pandas, zstandard, xxhash, tokenizers, transformers,
huggingface-hub, safetensors, regex, rich. Optional rows need more: accelerate and psutil (the Trainer), torchao (8-bit
products), torchtitan with torchdata, tyro, docstring-parser, shtab and typeguard.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "bench_peers.py"
SAMPLE = ROOT / "pretrain" / "models" / "sample"
WINDOW = 5  # steps between two times
LONGEST, SHORTEST = 150, 25  # seconds: the limit of a row, and what must be left of the budget to start one


@dataclass(frozen=True)
class Size:
    """The shape of a Llama and of a step."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    length: int
    batch: int
    vocabulary: int = 50304

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward: 6 for each weight of a product, and attention under the causal
        mask."""
        d, kv = self.width, self.width // self.heads * self.kv_heads
        products = self.layers * (2 * d * d + 2 * d * kv + 3 * d * self.ffn) + self.vocabulary * d
        return 6 * products + 6 * self.layers * d * self.length

    def overrides(self) -> str:
        return (
            f"model.overrides={{model_type: llama, hidden_size: {self.width}, intermediate_size: {self.ffn}, "
            f"num_hidden_layers: {self.layers}, num_attention_heads: {self.heads}, num_key_value_heads: {self.kv_heads}, "
            f"vocab_size: {self.vocabulary}, max_position_embeddings: 8192, tie_word_embeddings: false}}"
        )


SIZES = {"1.18B": Size(2048, 16, 32, 8, 8192, 2048, 8), "162M": Size(768, 12, 12, 12, 2048, 1024, 32)}
TINY = {"1.18B": Size(64, 2, 4, 2, 128, 64, 2, 4096), "162M": Size(32, 2, 2, 2, 64, 32, 2, 4096)}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        who: ours, or a program of `bench_peers.py`: bare · trainer · titan.
        size: a key of ``SIZES``.
        name: what the row shows.
        words: overrides of ours, or options of the peer.
        needs: a package without which the row is skipped.
        only_gpu: whether it can't run on a CPU.
    """

    who: str
    size: str
    name: str
    words: tuple[str, ...] = ()
    needs: str | None = None
    only_gpu: bool = False


COMPILED = "model.compile=true"
ROWS = (
    Row("ours", "1.18B", "compiled", (COMPILED,)),
    Row("titan", "1.18B", "compiled", ("--compile",), needs="torchtitan", only_gpu=True),
    Row("bare", "1.18B", "compiled", ("--compile",)),
    Row("ours", "162M", "compiled", (COMPILED,)),
    Row("titan", "162M", "compiled", ("--compile",), needs="torchtitan", only_gpu=True),
    Row("bare", "162M", "compiled", ("--compile",)),
    Row("ours", "1.18B", "eager"),
    Row("bare", "1.18B", "eager"),
    Row("ours", "1.18B", "document mask", (COMPILED, "dataset.document_mask=true")),
    Row("ours", "1.18B", "float8 tensorwise", (COMPILED, "transform=[float8]"), needs="torchao"),
    Row("ours", "1.18B", "fsdp", (COMPILED, "strategy=fsdp")),
    Row("ours", "1.18B", "checkpointing selective", (COMPILED, "model.gradient_checkpointing=selective")),
    Row("ours", "1.18B", "checkpointing true", (COMPILED, "model.gradient_checkpointing=true")),
    Row("trainer", "1.18B", "compiled", ("--compile",), needs="accelerate"),
    Row("ours", "1.18B", "one graph", ("model.compile=graph",)),
    Row("ours", "1.18B", "checkpointing 2", (COMPILED, "model.gradient_checkpointing=2")),
    Row(
        "ours",
        "1.18B",
        "float8 rowwise",
        (COMPILED, "transform=[float8]", "transform.float8.recipe=rowwise"),
        "torchao",
    ),
    Row("ours", "1.18B", "flex attention", (COMPILED, "model.attention=flex_attention"), only_gpu=True),
    Row("ours", "1.18B", "flash attention 2", (COMPILED, "model.attention=flash_attention_2"), "flash_attn", True),
    Row(
        "ours",
        "1.18B",
        "activations on the host",
        ("model.gradient_checkpointing=true", "model.activation_offload=true"),
    ),
    Row("ours", "1.18B", "adamw_8bit", (COMPILED, "optimizer=adamw_8bit")),
    Row("ours", "1.18B", "muon", (COMPILED, "optimizer=muon")),
    Row("ours", "162M", "document mask", (COMPILED, "dataset.document_mask=true")),
    Row("ours", "162M", "one graph", ("model.compile=graph",)),
    Row("ours", "162M", "eager"),
    Row("bare", "162M", "eager"),
    Row("trainer", "162M", "compiled", ("--compile",), needs="accelerate"),
)


# One row ---------------------------------------------------------------------------------------------------------------


def run_ours(row: Row, size: Size, folder: Path, steps: int, limit: float, device: str) -> dict[str, Any]:
    """Run this program until it has logged ``steps`` steps, then end it: how it saves is not measured here."""
    words = [
        *(f"output_dir={folder / 'run'}", "model=scratch", f"model.tokenizer_name={SAMPLE}", size.overrides()),
        *("dataset=local", f"dataset.nameOrPath={folder.parent / 'corpus.bin'}", "dataset.format=tokens"),
        *("dataset.token_dtype=uint16", "evaluation=new_only", "evaluation.samples=0"),
        f"evaluation.max_tokens={size.length * size.batch}",
        *("precision=bf16-mixed", f"sequence_length={size.length}", f"batch_size={size.batch}", "max_steps=1000"),
        *("scheduler=constant", "lr=1e-4", f"log_every={WINDOW}", "evaluate_every=null", "save_every=null"),
        *("sink=[jsonl]", "checkpoint.export=never", *row.words),
    ]
    if device == "cpu" and "transform=[float8]" in words:
        words.append("transform.float8.emulate=true")
    started = time.time()
    log, metrics, records = folder / "log", folder / "run" / "metrics.jsonl", []
    with log.open("w") as out:
        command = [sys.executable, "-m", "pretrain", *words]
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=environment(folder)
        )
        try:
            while child.poll() is None and time.time() - started < limit:
                time.sleep(0.2)
                records = train_records(metrics)
                if records and records[-1]["step"] >= steps:
                    break
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    seconds = time.time() - started
    if not records or records[-1]["step"] < steps:
        return {"failed": end_of(log), "seconds": seconds}
    late = records[2:] or records
    return {
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in late),
        "peak_gib": max(r["memory_gib"] for r in records),
        "to_step": seconds,
        "loss": records[-1]["loss"],
    }


def train_records(metrics: Path) -> list[dict[str, Any]]:
    """Return the complete records of training steps."""
    if not metrics.exists():
        return []
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [record for record in map(json.loads, lines) if record["event"] == "train"]


def run_peer(row: Row, size: Size, folder: Path, steps: int, limit: float, device: str) -> dict[str, Any]:
    """Run a program of `bench_peers.py` to its end."""
    started, log = time.time(), folder / "log"
    command = [sys.executable, str(PEERS), row.who, json.dumps(asdict(size)), str(steps), *row.words]
    with log.open("w") as out:
        try:
            subprocess.run(
                command, cwd=folder, stdout=out, stderr=out, timeout=limit, check=False, env=environment(folder)
            )
        except subprocess.TimeoutExpired:
            return {"failed": "not done in time", "seconds": time.time() - started}
    found = [line for line in log.read_text().splitlines() if line.startswith('{"times"')]
    if not found:
        return {"failed": end_of(log), "seconds": time.time() - started}
    result = json.loads(found[-1])
    late = result["times"][2:] or result["times"]
    rate = size.batch * size.length * WINDOW
    return {
        "tokens_per_second": statistics.median(rate / t for t in late),
        "peak_gib": result["peak_gib"],
        "to_step": result["finished_at"] - started,
    }


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a row: nothing is downloaded, and what is compiled is not taken from an earlier row."""
    own = {"PRETRAIN_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    return os.environ | own | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def end_of(log: Path) -> str:
    return log.read_text()[-1500:]


# All rows --------------------------------------------------------------------------------------------------------------


def write_corpus(path: Path, tokens: int) -> None:
    """Write documents of 100 to 1,000 random tokens, as uint16, each of which ends with the sample tokenizer's separator."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    draw = np.random.default_rng(0)
    ids = draw.integers(1, len(tokenizer), tokens, dtype=np.uint16)
    ids[ids == tokenizer.eos_token_id] = 1 if tokenizer.eos_token_id != 1 else 2
    ids[np.cumsum(draw.integers(100, 1000, tokens // 1000))] = tokenizer.eos_token_id
    ids.tofile(path)


def measure(
    row: Row, size: Size, folder: Path, *, steps: int, limit: float, device: str, peak: float | None
) -> dict[str, Any]:
    """Run one row in ``folder``, which exists already and is removed; return its JSON."""
    run = run_ours if row.who == "ours" else run_peer
    place = folder / "row"
    place.mkdir()
    try:
        result = run(row, size, place, steps, limit, device)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if "tokens_per_second" in result:
        is_counted = peak is not None and "float8" not in row.name
        mfu = result["tokens_per_second"] * size.flops_per_token / peak if is_counted and peak else None
        result["mfu"] = mfu
    return {"who": row.who, "size": row.size, "name": row.name, "words": list(row.words)} | result


def shown(result: dict[str, Any]) -> str:
    """Return a row of a Markdown table."""
    title = f"| {result['who']} | {result['size']} | {result['name']} |"
    if "skipped" in result:
        return f"{title} skipped: {result['skipped']} | | | |"
    if "failed" in result:
        return f"{title} FAILED after {result['seconds']:.0f} s | | | |\n{result['failed']}"
    mfu = "" if result["mfu"] is None else f"{result['mfu']:.3f}"
    return f"{title} {result['tokens_per_second']:,.0f} | {mfu} | {result['peak_gib']:.1f} | {result['to_step']:.0f} |"


def reason_to_skip(row: Row, device: str, left: float) -> str | None:
    if row.needs and find_spec(row.needs) is None:
        return f"{row.needs} is not installed"
    if row.only_gpu and device == "cpu":
        return "needs a GPU"
    return "the budget is spent" if left < SHORTEST else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, help="seconds for all rows (default: 480, with --tiny 7200)")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a row, a multiple of 5")
    parser.add_argument("--only", default="", help="regular expression of the rows, as '<who> <size> <name>'")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether every row runs")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="file for the results")
    asked = parser.parse_args()
    budget, started = asked.budget or (7200 if asked.tiny else 480), time.time()
    import torch

    from pretrain.telemetry.peaks import peak_flops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        parser.error("there is no GPU; --tiny tries the rows on a CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = peak_flops(name, "bfloat16") if device == "cuda" else None
    sizes = TINY if asked.tiny else SIZES
    results: list[dict[str, Any]] = []
    print(
        f"{name}, torch {torch.__version__}\n\n| | | | tokens/s | MFU | peak GiB | s to step {asked.steps} |",
        flush=True,
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus.bin", 200_000 if asked.tiny else 4_000_000)
        for row in ROWS:
            if not re.search(asked.only, f"{row.who} {row.size} {row.name}"):
                continue
            left = budget - (time.time() - started)
            if (skipped := reason_to_skip(row, device, left)) is not None:
                result = {"who": row.who, "size": row.size, "name": row.name, "skipped": skipped}
            else:
                limit = left if asked.tiny else min(left, LONGEST)
                options = {"steps": asked.steps, "limit": limit, "device": device, "peak": peak}
                result = measure(row, sizes[row.size], folder, **options)
            results.append(result)
            print(shown(result), flush=True)
            asked.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": results}, indent=1))
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
