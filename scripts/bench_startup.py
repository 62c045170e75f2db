"""How long from the command to the first optimizer step: this program beside an accelerate script.

    python scripts/bench_startup.py [--rounds 5] [--only single,ddp]

All train the shipped sample model on 8 sequences of 256 tokens a process. Ours is the whole program: it composes and checks
the configuration, reads the tokenizer, opens the token cache, claims the run folder, and before the first step it scores
2,048 held-out tokens of the new and of the base domain and continues a prompt of each. To the end, ours also does that once
more and writes a checkpoint and the model. Not in it: the console, the report.

Theirs is written twice, and started by `python`, or by `torchrun --nproc_per_node 2`, where accelerate makes it DDP, or with
its plugin DeepSpeed at stage 2, as ours. *The same work*: the tokenizer, the same texts through `datasets` (tokenized, cut
and split; all of that is in its cache), the scores and the prompts (by `generate`), one step with clipping; then both again,
`save_state` and `save_pretrained`. *The least*: random ids that are already tokens, one step, the two saves. FSDP is beside
DDP: accelerate has no FSDP on a CPU and trains with DDP instead.

All caches are warm: every command runs once before the first round. Commands of a round follow one another on the same
machine; ratios are medians over rounds. Needs `pip install accelerate`. Prints a Markdown table.
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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.telemetry.sinks.jsonl import read_records

if TYPE_CHECKING:
    from accelerate import Accelerator

SEQUENCE, BATCH, VOCABULARY = 256, 8, 4096
SCORED, PROMPT, CONTINUED = 2048, 24, 32  # tokens of each domain, as in ours
SAMPLE = Path(__file__).resolve().parent.parent / "pretrain" / "models" / "sample"
STRATEGIES = {"single": 1, "ddp": 2, "fsdp": 2, "deepspeed": 2}  # and their processes
PLUGIN = {"single": "plain", "ddp": "plain", "fsdp": "plain", "deepspeed": "deepspeed"}  # of the script beside each
WORK = ("same", "least")
ZERO_STAGE = 2


class Seconds(NamedTuple):
    """From the command to the end of the first optimizer step, and to the end of the process."""

    first_step: float
    end: float


# The contestants -------------------------------------------------------------------------------------------------------


def ours(strategy: str) -> Seconds:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        command = [
            *(sys.executable, "-m", "pretrain", f"strategy={strategy}", f"devices={STRATEGIES[strategy]}"),
            *("model_name=sample", f"sequence_length={SEQUENCE}", f"batch_size={BATCH}", f"output_dir={run}"),
            *("max_steps=1", f"evaluation.max_tokens={SCORED}", "sink=[jsonl]"),
            *("evaluation.kl_tokens=0", "evaluation.in_context=false"),  # theirs measures neither
        ]
        if strategy == "deepspeed":
            command.append(f"strategy.zero_stage={ZERO_STAGE}")
        started_at, end = timed(command)
        first = next(r for r in read_records(run / "metrics.jsonl") if r["event"] == "train")
    return Seconds(first["time"] - started_at, end)


def theirs(plugin: str, processes: int, work: str, texts: Path) -> Seconds:
    with tempfile.TemporaryDirectory() as name:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        started_at, end = timed([*launcher, __file__, "--script", plugin, work, str(texts), name])
        first_step_at = float(Path(name, "first_step_at").read_text())
    return Seconds(first_step_at - started_at, end)


def accelerate_script(plugin: str, work: str, texts: Path, folder: Path) -> None:
    """What runs in each of their processes."""
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from torch.utils.data import DataLoader, TensorDataset
    from transformers import AutoModelForCausalLM

    deepspeed = DeepSpeedPlugin(zero_stage=ZERO_STAGE, gradient_clipping=1.0) if plugin == "deepspeed" else None
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), deepspeed_plugin=deepspeed)
    if work == "same":
        tokenizer, blocks, held_out = tokenized(texts)
    else:
        blocks = TensorDataset(torch.randint(VOCABULARY, (BATCH * accelerator.num_processes, SEQUENCE)))
    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(blocks, batch_size=BATCH, shuffle=True))
    if work == "same":
        evaluate(accelerator, model, tokenizer, held_out)
    batch = next(iter(loader))
    ids = batch["input_ids"] if work == "same" else batch[0]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()
    if accelerator.is_main_process:
        (folder / "first_step_at").write_text(str(time.time()))
    if work == "same":
        evaluate(accelerator, model, tokenizer, held_out)
    accelerator.save_state(str(folder / "state"))
    accelerator.unwrap_model(model).save_pretrained(folder / "model", is_main_process=accelerator.is_main_process)
    accelerator.end_training()


def tokenized(texts: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The tokenizer, the new domain's training blocks, and each domain's held-out blocks: through `datasets`' cache."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)

    def blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [i for text in tokenizer(batch["text"])["input_ids"] for i in [*text, tokenizer.eos_token_id]]
        return {"input_ids": [ids[at : at + SEQUENCE] for at in range(0, len(ids) - SEQUENCE + 1, SEQUENCE)]}

    split = {}
    for name in ("new", "base"):
        rows = load_dataset("json", data_files=str(texts / f"{name}.jsonl"), split="train")
        cut = rows.map(blocks, batched=True, remove_columns=rows.column_names)
        split[name] = cut.train_test_split(test_size=0.01, seed=0).with_format("torch")
    return tokenizer, split["new"]["train"], {name: parts["test"] for name, parts in split.items()}


def evaluate(accelerator: Accelerator, model: Any, tokenizer: Any, held_out: dict[str, Any]) -> None:
    """Score some tokens of each domain, shared by the processes, and continue a prompt of each."""
    import torch
    from torch.utils.data import DataLoader

    model.eval()
    with torch.no_grad():
        for blocks in held_out.values():
            some = blocks.select(range(SCORED // SEQUENCE))
            for batch in accelerator.prepare(DataLoader(some, batch_size=BATCH // accelerator.num_processes)):
                ids = batch["input_ids"]
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.gather(loss).mean().item()
    if accelerator.is_main_process:
        prompts = torch.stack([blocks[0]["input_ids"][:PROMPT] for blocks in held_out.values()]).to(accelerator.device)
        plain = accelerator.unwrap_model(model)
        tokenizer.batch_decode(plain.generate(prompts, max_new_tokens=CONTINUED, do_sample=False))
    model.train()


def write_texts(folder: Path) -> None:
    """The texts of our two domains, for theirs."""
    from pretrain.data.sources.sample import English, Python
    from pretrain.data.tokenization.tokenize import training_texts

    for name, source in (("new", Python()), ("base", English())):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in training_texts(source))


# Processes and the table -----------------------------------------------------------------------------------------------


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command to its end: when it started, in Unix seconds, and how many it took. Raises when it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started_at, started = time.time(), time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return started_at, seconds


def one_round(strategies: list[str], texts: Path) -> Iterator[tuple[str, Seconds, list[Seconds]]]:
    """Each strategy's seconds, and those of the accelerate scripts beside it in the same round."""
    others: dict[tuple[str, int], list[Seconds]] = {}
    for strategy in strategies:
        beside = PLUGIN[strategy], STRATEGIES[strategy]
        if beside not in others:
            others[beside] = [theirs(*beside, work, texts) for work in WORK]
        yield strategy, ours(strategy), others[beside]


def cell(mine: list[float], others: list[list[float]]) -> str:
    """Our median, and each of theirs with the ratio to it."""
    words = [f"{statistics.median(mine):.1f}"]
    for other in others:
        ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
        words += [f"{statistics.median(other):.1f}", f"{ratio:.2f}"]
    return " | ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    parser.add_argument("--only", help=f"some of {','.join(STRATEGIES)}")
    asked = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        print("error: what ours is measured against needs `pip install accelerate`", file=sys.stderr)
        return 2
    strategies = asked.only.split(",") if asked.only else list(STRATEGIES)
    if unknown := set(strategies) - set(STRATEGIES):
        parser.error(f"--only {','.join(sorted(unknown))}: allowed are {', '.join(STRATEGIES)}")
    if "deepspeed" in strategies and importlib.util.find_spec("deepspeed") is None:
        print("deepspeed is left out: it is not installed", file=sys.stderr)
        strategies.remove("deepspeed")
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/cache"
        write_texts(Path(name))
        results = measured(strategies, asked.rounds, Path(name))
    print(table(results, asked.rounds))
    return 0


def measured(strategies: list[str], rounds: int, texts: Path) -> dict[str, list[tuple[Seconds, list[Seconds]]]]:
    """What each round took, by strategy, after one that is not counted."""
    results: dict[str, list[tuple[Seconds, list[Seconds]]]] = {strategy: [] for strategy in strategies}
    for number in range(rounds + 1):
        for strategy, mine, others in one_round(strategies, texts):
            seconds = ", ".join(
                f"{who} {s.first_step:.1f}" for who, s in zip(("ours", *WORK), (mine, *others), strict=True)
            )
            print(f"round {number or 'not counted'}: {strategy}: {seconds} s", file=sys.stderr)
            if number:
                results[strategy].append((mine, others))
    return results


def table(results: dict[str, list[tuple[Seconds, list[Seconds]]]], rounds: int) -> str:
    """Markdown: to the first step and to the end; ours, the same work and the least by accelerate, and the ratios."""
    theirs = " | accelerate, the same work | ratio | the least | ratio"
    lines = [
        f"Seconds; {rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} over the last 5 minutes.\n",
        f"| | processes | first step: ours{theirs} | end: ours{theirs} |",
        "|---" * 12 + "|",
    ]
    for strategy, pairs in results.items():
        cells = [
            cell([mine[i] for mine, _ in pairs], [[others[w][i] for _, others in pairs] for w in range(len(WORK))])
            for i in range(len(Seconds._fields))
        ]
        lines.append(f"| {strategy} | {STRATEGIES[strategy]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--script"]:
        plugin, work, texts, folder = sys.argv[2:]
        accelerate_script(plugin, work, Path(texts), Path(folder))
    else:
        sys.exit(main())
