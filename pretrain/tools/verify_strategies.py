"""Compare the strategies for your model and configuration: whether they agree, the memory of each, and its speed.

    python -m pretrain.tools.verify_strategies model_name=path/to/model dataset=local dataset.nameOrPath=books/

The arguments are those of a run. Every row is that run, `python -m pretrain`, in a process of its own and a temporary folder:
first strategy=single on one device, then each other strategy on N devices. With batch_size=b each of N processes computes b
sequences of a micro-batch; single computes b × N of them, so that all train on the same global batch of
b × N × gradient_accumulation_steps sequences in the same order, and differ by rounding only.

agrees: neither the loss of a step (absolute) nor its gradient norm (relative) differs from single's by more than the bound.
tokens/s: the median over the steps after the second, for all processes together. MFU is that of the same steps, if the
device's peak is known. GiB: the peak of the first process, allocated on its GPU; on a CPU it includes all libraries.
start-up: seconds from the command to the end of the first step, with the data already tokenized.

Runs of a model with dropout can't agree, because each process draws its own numbers: set it to 0, with
model.overrides.attention_dropout=0.0 or your model's own key. The single run must fit on one device, and TMPDIR needs space
for a checkpoint and a model.

Exit code 0: all agree; 1: one differs, or failed; 2: a mistake.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pretrain.config.check import gpu_visible
from pretrain.config.choices import choices
from pretrain.runtime.python import module_command
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.tools.arguments import tool_parser

if TYPE_CHECKING:
    from rich.console import Console

Records = list[dict[str, Any]]
OPTIONS = {  # a strategy with options has a row for each; any other strategy has one row
    "fsdp": [f"sharding_strategy={s}" for s in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")],
    "deepspeed": [f"zero_stage={stage}" for stage in range(4)],
}
STEPS, UNCOUNTED = 6, 2
OWN = ["resume=never", "sink=[jsonl]", "log_every=1", "evaluate_every=null", "save_every=null"]
OWN += ["evaluation.max_tokens=4096", "evaluation.per_epoch=null"]


class Failed(Exception):
    """A run failed. ``code`` is its exit code, ``message`` one line for a mistake (2), else its last lines."""

    def __init__(self, code: int, output: str) -> None:
        lines = [line for line in output.splitlines() if line.strip()]
        mistakes = [line for line in lines if line.startswith("error: ")]
        self.code = code
        self.message = mistakes[-1].removeprefix("error: ") if mistakes else "\n".join(lines[-10:])


@dataclass(frozen=True)
class Run:
    """The train records of a run, and the time of its start."""

    train: Records
    started_at: float

    @property
    def cells(self) -> list[str]:
        """The cells of its row: tokens per second, MFU, GiB, seconds of the start-up."""
        counted = self.train[UNCOUNTED:] or self.train[-1:]
        speed = statistics.median(r["tokens_per_second"] for r in counted)
        mfu = f"{statistics.median(r['mfu'] for r in counted):.3f}" if counted[0]["mfu"] is not None else ""
        memory = max(r["memory_gib"] for r in self.train)
        start_up = self.train[0]["time"] - self.started_at
        return [f"{speed:,.0f}", mfu, f"{memory:.2f}", f"{start_up:.1f}"]


def pretrain(arguments: list[str]) -> str:
    """Run ``python -m pretrain`` and return its output. Raises ``Failed``."""
    command = [*module_command("pretrain"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(done.returncode, done.stdout + done.stderr)
    return done.stdout


def trained(arguments: list[str]) -> Run:
    """Train in a temporary folder. Raises ``Failed``."""
    with tempfile.TemporaryDirectory(prefix="pretrain-verify-") as folder:
        started_at = time.time()
        pretrain([*arguments, f"output_dir={folder}/run"])
        records = read_records(Path(folder, "run", "metrics.jsonl"))
    return Run([r for r in records if r["event"] == "train"], started_at)


def differences(run: Run, reference: Run) -> tuple[float, float]:
    """Return the largest difference of the losses (absolute) and of the gradient norms (relative). It is infinite if only one of
    two values is a number."""
    steps = list(zip(run.train, reference.train, strict=True))
    losses = [_distance(a["loss"], b["loss"]) for a, b in steps]
    norms = [_distance(a["grad_norm"], b["grad_norm"]) / (b["grad_norm"] or 1.0) for a, b in steps]
    return max(losses), max(norms)


def _distance(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b)


def device_count(asked: str | int) -> int:
    """Return the run's ``devices``; for ``auto`` the number of GPUs, or two processes on a CPU."""
    if asked != "auto":
        return int(asked)
    if not gpu_visible():
        return 2
    import torch

    return torch.cuda.device_count() or 2


def rows(only: list[str], given: list[str]) -> dict[str, list[str]]:
    """Return the overrides of each row, by its name. The overrides of the strategy in the arguments, ``given``, are a row too."""
    named = {"as given": given} if given else {}
    for strategy in only:
        for option in OPTIONS.get(strategy, [""]):
            extra = [f"strategy.{option}"] if option else []
            named[f"{strategy} {option.partition('=')[2]}".strip()] = [f"strategy={strategy}", *extra]
    return named


def verify(asked: argparse.Namespace, overrides: list[str], console: Console) -> int:
    """Print the table of all rows and return the exit code. Raises ``Failed`` if the reference fails."""
    from rich import box
    from rich.table import Table

    given = [o for o in overrides if o.lstrip("+").split("=")[0].split(".")[0] == "strategy"]
    common = [o for o in overrides if o not in given]
    config = yaml.safe_load(pretrain([*common, "--cfg", "job"]))
    devices, batch_size = asked.devices or device_count(config["devices"]), config["batch_size"]
    exact = config["precision"]["name"] == "32-true" and not config["precision"]["tf32"]
    bound = asked.bound if asked.bound is not None else 1e-5 if exact else 2e-2
    common += [*OWN, f"max_steps={config['max_steps'] or STEPS}"]

    def announced(name: str, arguments: list[str]) -> Run:
        print(f"{name} ...", file=sys.stderr, flush=True)
        return trained([*common, *arguments])

    print("tokens ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="pretrain-verify-") as folder:
        pretrain([*common, "strategy=single", "task=tokenization", f"output_dir={folder}"])
    reference = announced("single", ["strategy=single", "devices=1", f"batch_size={batch_size * devices}"])
    table = Table(box=box.SIMPLE if console.is_terminal else None)
    for i, column in enumerate(["strategy", "Δ loss", "Δ grad norm", "agrees", "tokens/s", "MFU", "GiB", "start-up s"]):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    table.add_row("single", "", "", "", *reference.cells)
    verdicts: list[bool] = []
    not_run: dict[str, list[str]] = {}
    for name, arguments in rows(asked.only, given).items():
        try:
            run = announced(name, [*arguments, f"devices={devices}", f"batch_size={batch_size}"])
        except Failed as failure:
            not_run.setdefault(failure.message, []).append(name)
            if failure.code != 2:
                verdicts.append(False)
                table.add_row(name, "", "", "failed")
            continue
        loss, norm = differences(run, reference)
        verdicts.append(loss <= bound and norm <= bound)
        table.add_row(name, f"{loss:.1e}", f"{norm:.1e}", "yes" if verdicts[-1] else "no", *run.cells)
    console.print(table)
    for message, names in not_run.items():
        print(f"not measured: {', '.join(names)}: {message}")
    print(
        f"{devices} processes × batch_size {batch_size}, single {batch_size * devices} at once; precision "
        f"{config['precision']['name']}; agreeing is a difference of at most {bound:g}"
    )
    if not all(verdicts):
        print("A model with dropout can't agree: set it to 0. Long runs of large models drift further than the bound.")
    return 2 if not verdicts else 0 if all(verdicts) else 1


def main() -> None:
    from rich.console import Console

    parser = tool_parser("verify_strategies", __doc__)
    known = [s for s in choices("strategy") if s not in ("single", "dp")]  # dp is for one process and several GPUs
    parser.add_argument("--devices", type=int, help="processes; default: devices=, else all GPUs, or 2 on a CPU")
    parser.add_argument("--only", type=lambda names: names.split(","), default=known, help=f"default {','.join(known)}")
    parser.add_argument("--bound", type=float, help="default 1e-5 in 32-true, else (tf32 too) 2e-2")
    asked, overrides = parser.parse_known_args()
    if unknown := set(asked.only) - set(choices("strategy")):
        parser.error(f"--only {','.join(sorted(unknown))}: allowed are {', '.join(choices('strategy'))}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        raise SystemExit(verify(asked, overrides, console))
    except Failed as failure:
        print(f"error: {failure.message}", file=sys.stderr)
        raise SystemExit(2 if failure.code == 2 else 1) from None


if __name__ == "__main__":
    main()
