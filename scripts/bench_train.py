"""How fast is a training step: the real program beside a bare PyTorch loop and the Hugging Face Trainer.

    python scripts/bench_train.py [--rounds 3] [--steps 12] [--only eager-bf16] [--shape smollm2]

A GPT-2 with 50,257 words; the same weights and blocks for all. On a CPU of 4 layers × 256, with sequences of 512, 2 × 4 of
them a step; on a GPU GPT-2 small, 12 layers × 768, with sequences of 1024, 2 × 16 a step. `--shape smollm2`: a Llama of the
shape of SmolLM2-135M (30 layers × 576, 9 heads, 3 for keys and values, MLP 1536, vocabulary 49,152, head tied). Each run is a
process of its own, runs alternate, medians are shown; at the end of each step the device is waited for. Peak: resident, or
allocated on the GPU. The last columns are of processor time, which a loaded machine changes least: seconds of a step, for
which each command is started once more with one step and its seconds are subtracted, and the ratio to the Trainer's.
`pip install accelerate` adds the Trainer's row. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pretrain.config.check import gpu_visible

DEVICE = "cuda" if gpu_visible() else "cpu"
SHAPE = os.environ.get("PRETRAIN_BENCH_SHAPE", "gpt2")  # set by --shape, for the processes that this one starts
SEQUENCE, BATCH, LAYERS, WIDTH, HEADS = (1024, 16, 12, 768, 12) if DEVICE == "cuda" else (512, 4, 4, 256, 4)
ACCUMULATION, VOCABULARY = 2, 50257
SMOLLM2 = {  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
SAMPLE = Path(__file__).resolve().parent.parent / "pretrain" / "models" / "sample"
STEP_TOKENS = SEQUENCE * BATCH * ACCUMULATION
LR, CLIP, DECAY, BETAS = 1e-3, 1.0, 0.1, (0.9, 0.95)
UNCOUNTED = 3  # first steps: allocation, compilation
MODES = {"eager-fp32": ("32-true", False), "eager-bf16": ("bf16-mixed", False), "compiled-bf16": ("bf16-mixed", True)}
Result = dict[str, Any]


# The three contestants -------------------------------------------------------------------------------------------------


def ours(folder: Path, steps: int, precision: str, compiled: bool) -> Result:
    """`python -m pretrain`, told nothing but what to train on; its own metrics.jsonl is the clock."""
    with tempfile.TemporaryDirectory() as run:
        command = [
            *(sys.executable, "-m", "pretrain", f"output_dir={run}/run", f"model_name={folder / 'model'}"),
            *("dataset=local", f"dataset.nameOrPath={folder / 'corpus.parquet'}", "dataset.held_out=0.0"),
            *("evaluation=new_only", f"precision={precision}", f"model.compile={str(compiled).lower()}"),
            *(f"sequence_length={SEQUENCE}", f"batch_size={BATCH}", f"gradient_accumulation_steps={ACCUMULATION}"),
            *(f"max_steps={steps}", f"lr={LR}", "scheduler=constant", "warmup_proportion=0.0", f"grad_clip={CLIP}"),
            *(f"weight_decay={DECAY}", f"beta1={BETAS[0]}", f"beta2={BETAS[1]}", "log_every=1", "sink=[jsonl]"),
        ]
        peak, seconds = measured(command, folder)
        records = [json.loads(line) for line in Path(run, "run", "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["event"] == "train"]
    if DEVICE == "cuda":
        peak = max(r["memory_gib"] for r in train) * 1024
    losses = [r["loss"] for r in train]
    return {"seconds": [r["step_seconds"] for r in train], "losses": losses, "peak_mib": peak, "processor": seconds}


def bare(folder: Path, steps: int, precision: str, compiled: bool) -> Result:
    """The loop everybody writes: the model's own loss, AdamW, clipping. (Labels given shifted, so that all 512 count.)"""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").to(DEVICE).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    blocks = torch.load(folder / "blocks.pt")
    seconds, losses = [], []
    for step in range(steps):
        started_at = time.perf_counter()
        total = torch.zeros((), device=DEVICE)
        for ids, labels in ((ids.to(DEVICE), labels.to(DEVICE)) for ids, labels in blocks[step]):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = forward(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss / ACCUMULATION
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        seconds.append(time.perf_counter() - started_at)
    return {"seconds": seconds, "losses": losses} | allocated()


def trainer(folder: Path, steps: int, precision: str, compiled: bool) -> Result:
    """The Hugging Face Trainer with the same settings."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    blocks = torch.load(folder / "blocks.pt")
    rows = [row for step in blocks for ids, _ in step for row in ids]
    clock = Clock()
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        bf16=precision == "bf16-mixed",
        torch_compile=compiled,
        use_cpu=DEVICE == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        settings,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[clock],
    ).train()
    return {"seconds": [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)], "losses": []} | allocated()


def allocated() -> Result:
    """The peak of this process on a GPU; on a CPU the process that started it measures it."""
    import torch

    return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if DEVICE == "cuda" else {}


# What they run on ------------------------------------------------------------------------------------------------------


def set_up(folder: Path, steps: int, *_: Any) -> Result:
    """Model folder, a corpus of token ids that fall off like words do, and the blocks our loader makes of it."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from pretrain.data.loader import Loader
    from pretrain.data.sources.local import Local
    from pretrain.data.tokenization.tokenize import prepare

    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": SEQUENCE, "vocab_size": VOCABULARY}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # so that losses can be compared
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)  # it knows fewer words than the model; no text is read with it
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if SHAPE == "smollm2":
        LlamaForCausalLM(LlamaConfig(**SMOLLM2, **special)).save_pretrained(folder / "model")
    else:
        GPT2LMHeadModel(GPT2Config(**shape, **dropout, **special)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    draw = np.random.default_rng(0)
    documents = [1 + (draw.zipf(1.2, 700) - 1) % (len(tokenizer) - 1) for _ in range(steps * STEP_TOKENS // 700 + 20)]
    pq.write_table(pa.table({"input_ids": [d.tolist() for d in documents]}), folder / "corpus.parquet")
    source = Local(nameOrPath=str(folder / "corpus.parquet"), held_out=0.0)
    store = prepare(source, tokenizer_json=tokenizer.backend_tokenizer.to_str(), eot=tokenizer.eos_token_id)
    view, _ = store.views(held_out=0.0, train_data_ratio=1.0, deduplicate=False)
    loader = Loader(view, sequence_length=SEQUENCE, seed=0, batch_size=BATCH, accumulation=ACCUMULATION)
    batches = [batch for batch, _ in zip(loader, range(steps), strict=False)]
    torch.save([[(m.input_ids, m.labels) for m in b.split(BATCH)] for b in batches], folder / "blocks.pt")
    return {}


# Processes and tables --------------------------------------------------------------------------------------------------

IN_A_CHILD = {"bare": bare, "trainer": trainer, "set_up": set_up}


def measured(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command to its end; its peak resident memory in MiB and its seconds of processor time. Raises when it fails."""
    environment = os.environ | {"PRETRAIN_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    log = folder / "log"
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text()}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def run(who: str, folder: Path, steps: int, precision: str, compiled: bool) -> Result:
    if who == "ours":
        return ours(folder, steps, precision, compiled)
    out = folder / "result.json"
    command = [
        sys.executable,
        __file__,
        "--child",
        who,
        str(folder),
        str(steps),
        precision,
        str(int(compiled)),
        str(out),
    ]
    peak, seconds = measured(command, folder)
    return {"peak_mib": peak, "processor": seconds, **json.loads(out.read_text())}


def child(who: str, folder: str, steps: str, precision: str, compiled: str, out: str) -> None:
    result = IN_A_CHILD[who](Path(folder), int(steps), precision, compiled == "1")
    Path(out).write_text(json.dumps(result))


def speed(results: list[Result]) -> float:
    """Tokens per second: the median of the runs' median steps."""
    return STEP_TOKENS / statistics.median(statistics.median(r["seconds"][UNCOUNTED:]) for r in results)


def processor_seconds(results: list[Result]) -> float:
    """Processor seconds of a step: the median of the runs."""
    return statistics.median(r["processor_step"] for r in results)


def table(mode: str, results: dict[str, list[Result]]) -> None:
    base_speed = speed(results["bare"])
    largest = max(statistics.median(r["peak_mib"] for r in runs) for runs in results.values())
    print(
        f"\n**{mode}**\n\n| | tokens/s | × bare | peak MiB | × largest | processor s a step | × |\n|---|---|---|---|---|---|---|"
    )
    last = list(results)[-1]
    for who, runs in results.items():
        peak = statistics.median(r["peak_mib"] for r in runs)
        seconds = processor_seconds(runs)
        ratios = f"{speed(runs):,.0f} | {speed(runs) / base_speed:.2f} | {peak:,.0f} | {peak / largest:.2f}"
        print(f"| {who} | {ratios} | {seconds:,.2f} | {seconds / processor_seconds(results[last]):.2f} |")
    pairs = zip(results["ours"][0]["losses"], results["bare"][0]["losses"], strict=True)
    print(f"\nlargest difference of a step's loss, ours to bare: {max(abs(a - b) for a, b in pairs):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps a run, the first {UNCOUNTED} uncounted")
    parser.add_argument("--only", choices=MODES, action="append", help="one of the modes; may be repeated")
    parser.add_argument("--shape", choices=["gpt2", "smollm2"], default=SHAPE, help="the model")
    asked = parser.parse_args()
    os.environ["PRETRAIN_BENCH_SHAPE"] = asked.shape
    contestants = ["ours", "bare", "trainer"]
    if importlib.util.find_spec("accelerate") is None:
        print("The Trainer is left out: it needs `pip install accelerate`.", file=sys.stderr)
        contestants.remove("trainer")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("set_up", folder, asked.steps, "", False)
        for mode in asked.only or MODES:
            results: dict[str, list[Result]] = {who: [] for who in contestants}
            for _ in range(asked.rounds):
                for who in contestants:
                    one = run(who, folder, 1, *MODES[mode])
                    full = run(who, folder, asked.steps, *MODES[mode])
                    a_step = (full["processor"] - one["processor"]) / (asked.steps - 1)
                    results[who].append(full | {"processor_step": a_step})
            table(mode, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
