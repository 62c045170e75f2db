"""Compare the memory that a plan predicts with the memory that torch's allocator reports in a real run of the same steps.

    python scripts/bench_plan.py                # the table of docs/memory.md
    python scripts/bench_plan.py --only gpt2    # the rows whose name contains a word

Every row trains a small model with random weights for two steps on the CPU, with 1 or 2 processes. The measured number is the
largest sum of the allocations that the allocator has reported to torch's profiler and that were not freed: this includes
temporary memory inside of kernels, which a plan can't see. It is not the resident memory of the process, which also holds
libraries and freed memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pretrain

MODELS = {
    "llama": "{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 10, num_attention_heads: 8, "
    "num_key_value_heads: 2, vocab_size: 4096, max_position_embeddings: 1024}",
    "gpt2": "{model_type: gpt2, n_embd: 256, n_layer: 8, n_head: 8, vocab_size: 4096, n_positions: 1024, resid_pdrop: 0, "
    "embd_pdrop: 0, attn_pdrop: 0}",
    "gemma2": "{model_type: gemma2, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 8, num_attention_heads: 6, "
    "num_key_value_heads: 3, head_dim: 32, vocab_size: 4096, max_position_embeddings: 1024, sliding_window: 64}",
    "neox": "{model_type: gpt_neox, hidden_size: 256, intermediate_size: 1024, num_hidden_layers: 6, num_attention_heads: 8, "
    "vocab_size: 4096, max_position_embeddings: 1024}",
}
COMMON = ["model=scratch", "sequence_length=256", "plan.device=cpu", "plan.devices=[]"]
ROWS = (  # name of the model, processes, overrides
    ("llama", 1, ["strategy=single", "batch_size=8"]),
    ("llama", 1, ["strategy=single", "batch_size=8", "model.gradient_checkpointing=true"]),
    ("llama", 1, ["strategy=single", "batch_size=4", "precision=bf16-mixed"]),
    ("llama", 1, ["strategy=single", "batch_size=8", "precision=bf16-true"]),
    ("gpt2", 1, ["strategy=single", "batch_size=8", "gradient_accumulation_steps=2"]),
    ("gpt2", 1, ["strategy=single", "batch_size=8", "model.gradient_checkpointing=true", "precision=bf16-mixed"]),
    ("gemma2", 1, ["strategy=single", "batch_size=4", "model.attention=eager"]),
    ("neox", 1, ["strategy=single", "batch_size=8", "model.gradient_checkpointing=true"]),
    ("llama", 2, ["strategy=ddp", "batch_size=4"]),
    ("gpt2", 2, ["strategy=ddp", "batch_size=4", "gradient_accumulation_steps=2", "model.gradient_checkpointing=true"]),
    ("llama", 2, ["strategy=fsdp", "batch_size=4"]),
    ("llama", 2, ["strategy=fsdp", "batch_size=4", "precision=bf16-mixed", "model.gradient_checkpointing=true"]),
    ("gpt2", 2, ["strategy=fsdp", "batch_size=4", "strategy.sharding_strategy=SHARD_GRAD_OP"]),
    ("llama", 1, ["strategy=single", "batch_size=8", "model.compile=true"]),
    ("llama", 1, ["strategy=single", "batch_size=8", "model.compile=true", "model.gradient_checkpointing=true"]),
    ("llama", 1, ["strategy=single", "batch_size=8", "model.compile=true", "precision=bf16-mixed"]),
    ("gpt2", 1, ["strategy=single", "batch_size=8", "model.compile=true", "gradient_accumulation_steps=2"]),
    ("gemma2", 1, ["strategy=single", "batch_size=4", "model.compile=true"]),
    ("llama", 2, ["strategy=fsdp", "batch_size=4", "model.compile=true"]),
    ("gpt2", 2, ["strategy=ddp", "batch_size=4", "model.compile=true", "model.gradient_checkpointing=true"]),
    *(("llama", 2, ["strategy=deepspeed", f"strategy.zero_stage={stage}", "batch_size=4"]) for stage in (1, 2, 3)),
    *(
        ("llama", 2, ["strategy=deepspeed", f"strategy.zero_stage={stage}", "batch_size=4", "precision=bf16-mixed"])
        for stage in (1, 2, 3)
    ),
    (
        "gpt2",
        2,
        ["strategy=deepspeed", "batch_size=4", "model.gradient_checkpointing=true", "gradient_accumulation_steps=2"],
    ),
)


def words_of(model: str, overrides: list[str], folder: str) -> list[str]:
    """Return the command line of a row."""
    return [*COMMON, f"model.overrides={MODELS[model]}", f"output_dir={folder}", *overrides]


def predicted(words: list[str], processes: int) -> float:
    """Return the peak in bytes that the plan of a row predicts for each process."""
    from pretrain.distributed.topology import Topology
    from pretrain.run.planning import plan_of

    found = plan_of(pretrain.compose(words), topology=Topology("cpu", processes)).peak_bytes
    assert found is not None
    return found


def measured(words: list[str], processes: int, folder: Path) -> float:
    """Run a row in ``processes`` processes and return the peak in bytes of rank 0."""
    store, out = folder / "store", folder / "peak"
    store.unlink(missing_ok=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", json.dumps([rank, processes, str(store), str(out), words])]
        )
        for rank in range(processes)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a process has failed")
    return float(out.read_text())


def run_rank(rank: int, processes: int, store: str, out: str, words: list[str]) -> None:
    """Train two steps as one rank; rank 0 writes its peak to the file ``out``."""
    from torch.profiler import ProfilerActivity, profile

    from pretrain.distributed.context import leave
    from pretrain.distributed.rank_info import RankInfo
    from pretrain.distributed.topology import Topology
    from pretrain.run import build
    from pretrain.run.prepare import Prepared, model_spec

    config = pretrain.compose(words).with_lr(1e-4)
    place = RankInfo(rank, rank, Topology("cpu", processes), store=store)
    world = build.build_world(config, place, group=config.strategy.needs_group)
    prepared: Any = Prepared(model_spec(config), *[None] * 5)  # type: ignore[arg-type]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = build.build_engine(config, prepared, world)
        for step in range(2):
            engine.set_lr(lambda step: 1.0, step)
            engine.train_step(random_batch(config))
    if rank == 0:
        Path(out).write_text(str(allocated_peak(profiler)))
    leave()


def random_batch(config: Any) -> Any:
    """Return one rank's share of a global batch of random tokens."""
    import torch

    from pretrain.data.batch import Batch

    rows = config.batch_size * config.gradient_accumulation_steps
    ids = torch.randint(0, 4096, (rows, config.sequence_length))
    return Batch(ids, ids.roll(-1, 1), None, num_targets=ids.numel(), micro_batch_size=config.batch_size)


def allocated_peak(profiler: Any) -> float:
    """Return the largest number of bytes that were allocated at one time while ``profiler`` ran."""
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0.0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the rows to run")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        run_rank(*json.loads(given.rank))
        return
    print(
        "| model | processes | settings | predicted MiB | measured MiB | difference |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for model, processes, overrides in ROWS:
        if given.only not in f"{model} {' '.join(overrides)}":
            continue
        with tempfile.TemporaryDirectory() as folder:
            words = words_of(model, overrides, f"{folder}/run")
            wanted, found = predicted(words, processes), measured(words, processes, Path(folder))
        numbers = f"{wanted / 2**20:.1f} | {found / 2**20:.1f} | {wanted / found - 1:+.1%}"
        print(f"| {model} | {processes} | {' '.join(overrides)} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
