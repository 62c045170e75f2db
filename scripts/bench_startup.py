"""How long from the command to the first optimizer step: this program beside a plain accelerate script.

    python scripts/bench_startup.py [--rounds 5] [--only single,ddp] [overrides of ours ...]

Both train the shipped sample model on 8 sequences of 256 tokens a process. Theirs is the shortest script one would write:
`Accelerator()`, `from_pretrained`, AdamW, a DataLoader over random ids that are already tokens, `prepare`, one step with
clipping, `save_state`, `save_pretrained`; started by `python`, and by `torchrun --nproc_per_node 2`, where accelerate makes
it DDP, or with its plugin DeepSpeed at stage 2, as ours. FSDP is beside DDP: accelerate has no FSDP on a CPU and trains with
DDP instead.

Ours is the whole program: it composes and checks the configuration, opens the token cache (warm: a run before the first
round fills it), claims the run folder, and scores 2,048 tokens of the new and of the base domain before the first step; with
`evaluation=new_only` of the new one alone. Not in it: the console, the report. To the end, ours also scores
once more and writes a checkpoint and the model, theirs writes the same two.

Commands of a round follow one another on the same machine; ratios are medians over rounds. Needs `pip install accelerate`.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pretrain.telemetry.jsonl import read_records

SEQUENCE, BATCH, VOCABULARY = 256, 8, 4096
STRATEGIES = {"single": 1, "ddp": 2, "fsdp": 2, "deepspeed": 2}  # and their processes
THEIRS = {"single": "plain", "ddp": "plain", "fsdp": "plain", "deepspeed": "deepspeed"}  # the script beside each
ZERO_STAGE = 2


class Seconds(NamedTuple):
    """From the command to the end of the first optimizer step, and to the end of the process."""

    first_step: float
    end: float


# The two contestants ---------------------------------------------------------------------------------------------------


def ours(strategy: str, overrides: list[str]) -> Seconds:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        command = [
            *(sys.executable, "-m", "pretrain", f"strategy={strategy}", f"devices={STRATEGIES[strategy]}"),
            *("model_name=sample", f"sequence_length={SEQUENCE}", f"batch_size={BATCH}", f"output_dir={run}"),
            *("max_steps=1", "evaluation.max_tokens=2048", "sink=[jsonl]", *overrides),
        ]
        if strategy == "deepspeed":
            command.append(f"strategy.zero_stage={ZERO_STAGE}")
        started_at, end = timed(command)
        first = next(r for r in read_records(run / "metrics.jsonl") if r["event"] == "train")
    return Seconds(first["time"] - started_at, end)


def theirs(script: str, processes: int) -> Seconds:
    with tempfile.TemporaryDirectory() as name:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        started_at, end = timed([*launcher, __file__, "--script", script, name])
        first_step_at = float(Path(name, "first_step_at").read_text())
    return Seconds(first_step_at - started_at, end)


def accelerate_script(script: str, folder: Path) -> None:
    """What runs in each of their processes."""
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from torch.utils.data import DataLoader, TensorDataset
    from transformers import AutoModelForCausalLM

    plugin = DeepSpeedPlugin(zero_stage=ZERO_STAGE, gradient_clipping=1.0) if script == "deepspeed" else None
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), deepspeed_plugin=plugin)
    sample = Path(__file__).resolve().parent.parent / "pretrain" / "models" / "sample"
    model = AutoModelForCausalLM.from_pretrained(sample, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    blocks = TensorDataset(torch.randint(VOCABULARY, (BATCH * accelerator.num_processes, SEQUENCE)))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(blocks, batch_size=BATCH, shuffle=True))
    (ids,) = next(iter(loader))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()
    if accelerator.is_main_process:
        (folder / "first_step_at").write_text(str(time.time()))
    accelerator.save_state(str(folder / "state"))
    accelerator.unwrap_model(model).save_pretrained(folder / "model", is_main_process=accelerator.is_main_process)
    accelerator.end_training()


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


def one_round(strategies: list[str], overrides: list[str]) -> Iterator[tuple[str, Seconds, Seconds]]:
    """Each strategy's seconds, and those of the accelerate script beside it in the same round."""
    others: dict[tuple[str, int], Seconds] = {}
    for strategy in strategies:
        beside = THEIRS[strategy], STRATEGIES[strategy]
        if beside not in others:
            others[beside] = theirs(*beside)
        yield strategy, ours(strategy, overrides), others[beside]


def cell(mine: list[float], other: list[float]) -> str:
    ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
    return f"{statistics.median(mine):.1f} | {statistics.median(other):.1f} | {ratio:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    parser.add_argument("--only", help=f"some of {','.join(STRATEGIES)}")
    parser.add_argument("overrides", nargs="*", help="of our runs, such as evaluation=new_only")
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
    ours("single", asked.overrides)  # fills the token cache, and Python's and the system's own
    if "deepspeed" in strategies:
        theirs("deepspeed", STRATEGIES["deepspeed"])  # compiles DeepSpeed's C++ where that was never done
    results: dict[str, list[tuple[Seconds, Seconds]]] = {strategy: [] for strategy in strategies}
    for number in range(1, asked.rounds + 1):
        for strategy, mine, other in one_round(strategies, asked.overrides):
            results[strategy].append((mine, other))
            print(
                f"round {number}: {strategy} {mine.first_step:.1f} s, theirs {other.first_step:.1f} s", file=sys.stderr
            )
    print(
        f"Seconds; {asked.rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} over the last 5 minutes.\n"
    )
    print("| | processes | first step: ours | accelerate | ratio | end: ours | accelerate | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for strategy, pairs in results.items():
        first = cell([mine.first_step for mine, _ in pairs], [other.first_step for _, other in pairs])
        end = cell([mine.end for mine, _ in pairs], [other.end for _, other in pairs])
        print(f"| {strategy} | {STRATEGIES[strategy]} | {first} | {end} |")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--script"]:
        accelerate_script(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
