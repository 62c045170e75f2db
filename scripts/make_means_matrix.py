"""Which lever works under which strategy: docs/means.md, from runs of the shipped sample.

    python scripts/make_means_matrix.py [--only lora --only expand] [--strategies single,fsdp] [--folder outputs/means-matrix]

Each cell is a run of 4 steps with a checkpoint at step 2, in two processes (single: one) on the CPU. It answers, in this order:

runs      the command ends with 0. If it ends with 2, the cell shows its error, which is the documented reason of a hole
equal     the losses of its evaluations equal those of one process (relative difference below 1e-4)
resumes   what is left at step 2 ends with the same records, weights and moments as the uninterrupted run, bit for bit
exports   model/ is there
loads     plain `from_pretrained` reads it with no weight missing or unknown; lora: PEFT reads adapter/ with the same logits

The processes are forked from one that has imported torch. FOLDER/cells.json keeps the finished cells, so that the same command
continues what was stopped, and two commands can share the work; delete it to run everything again. The page is written once
every cell is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.preloaded import run_preloaded  # noqa: E402
from tests.runs import assert_same_run  # noqa: E402

PAGE = ROOT / "docs/means.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
COMMON = [
    "sequence_length=64",
    "max_steps=4",
    "save_every=2",
    "evaluate_every=4",
    "log_every=1",
    "checkpoint.keep_last=2",
]
COMMON += ["evaluation.max_tokens=512", "evaluation.kl_tokens=0", "evaluation.samples=0", "sink=[jsonl]", "lr=1e-3"]
CUT = 2  # the step of the checkpoint that a run is resumed from
LORA = ["transform=[lora]", "transform.lora.rank=8"]
VOCABULARY = ["transform=[vocabulary]", "transform.vocabulary.size=100"]
LEVERS = {
    "none": [],
    "replay": ["replay.share=0.25"],
    "kl_to_base": ["objective=kl_to_base"],
    "l2_to_base": ["objective=l2_to_base"],
    "stop_when": ["stop_when.tokens=700", "stop_when.patience=3"],
    "ema": ["hook=[ema]"],
    "merge.curve, choose": ["merge.curve=[0,0.5,1]", "merge.choose='forgetting<=0.01'"],
    "freeze": ["transform=[freeze]", "transform.freeze.frozen=embed"],
    "freeze, thawed": ["transform=[freeze]", "transform.freeze.trainable=embed", "transform.freeze.thaw_at=0.6"],
    "lr_multipliers, layer_decay": ["optimizer.lr_multipliers={embed: 0.1}", "optimizer.layer_decay=0.9"],
    "lora": LORA,
    "lora, rslora": [*LORA, "transform.lora.rslora=true"],
    "lora, dora": [*LORA, "transform.lora.dora=true"],
    "lora, modules_to_save": [
        *LORA,
        "transform.lora.modules_to_save=[embeddings]",
        "transform.lora.modules_to_save_lr=0.5",
    ],
    "expand": ["transform=[expand]", "transform.expand.blocks=1"],
    "vocabulary": VOCABULARY,
    "vocabulary, new rows": [*VOCABULARY, "transform.vocabulary.only_new_rows=true"],
    "float8": ["transform=[float8]"],
    "float8, emulated": ["transform=[float8]", "transform.float8.emulate=true"],
    "overrides": ["model.overrides={rope_scaling: {rope_type: linear, factor: 2.0}}"],
    "gradient_checkpointing=selective": ["model.gradient_checkpointing=selective"],
    "muon": ["optimizer=muon"],
    "adafactor": ["optimizer=adafactor"],
    "adamw_8bit": ["optimizer=adamw_8bit"],
    "infinite, start_lr": ["scheduler=infinite", "scheduler.start_lr=1e-4", "warmup_proportion=0.5"],
    "wsd": ["scheduler=wsd"],
    "inverse_sqrt": ["scheduler=inverse_sqrt"],
}
TWO = ["devices=2", "batch_size=2"]
STRATEGIES = {
    "single": ["strategy=single", "batch_size=4"],
    "dp": ["strategy=dp", *TWO],
    "ddp": ["strategy=ddp", *TWO],
    "fsdp": ["strategy=fsdp", *TWO],
    **{f"ZeRO {stage}": ["strategy=deepspeed", f"strategy.zero_stage={stage}", *TWO] for stage in range(4)},
}
CHECKS = ("runs", "equal", "resumes", "exports", "loads")
Cell = dict[str, Any]


def run(folder: Path, words: list[str]) -> tuple[int, str]:
    """Run a command; return its exit code and its error line, if it has one."""
    done = run_preloaded(["-m", "pretrain", *COMMON, *words, f"output_dir={folder}"], cwd=ROOT)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return done.returncode, (errors or lines or [""])[-1]


def evaluations(folder: Path) -> dict[str, float]:
    """Return the loss of each evaluation by domain and step."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {f"{r['domain']} {r['step']}": r["loss"] for r in records if r["event"] == "evaluation"}


def is_equal(ours: dict[str, float], single: dict[str, float]) -> bool:
    return ours.keys() == single.keys() and all(abs(ours[k] / single[k] - 1) < 1e-4 for k in ours)


def resumes(folder: Path, words: list[str]) -> bool:
    """Return whether the run that is cut off at step 2 ends as the uninterrupted one."""
    again = folder.with_name(f"{folder.name}-again")
    shutil.copytree(folder, again)
    for later in [*(again / "checkpoints").glob("step-*[0-9]"), *map(again.joinpath, ("model", "adapter", "averages"))]:
        if not later.name.endswith(f"{CUT:08d}"):
            shutil.rmtree(later, ignore_errors=True)
    try:
        if run(again, words)[0]:
            return False
        assert_same_run(again, folder)
    except AssertionError:
        return False
    finally:
        shutil.rmtree(again)
    return True


def loads(folder: Path) -> bool:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"] or info["unexpected_keys"]:
        return False
    if not (folder / "adapter").exists():
        return True
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(ROOT / "pretrain/models/sample", dtype=torch.float32)
    adapted, ids = PeftModel.from_pretrained(base, folder / "adapter").eval(), torch.arange(32)[None]
    with torch.no_grad():
        return bool(torch.allclose(adapted(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4))


def cell(folder: Path, words: list[str], single: Cell | None) -> Cell:
    """Run one cell in ``folder``, which is removed again. ``single``: the cell of one process; ``None``: it is this one."""
    shutil.rmtree(folder, ignore_errors=True)
    code, error = run(folder, words)
    if code:
        return {"runs": False, "code": code, "why": error}
    losses = evaluations(folder)
    found = {
        "runs": True,
        "losses": losses,
        "equal": is_equal(losses, (single or {"losses": losses}).get("losses", {})),
        "resumes": resumes(folder, words),
        "exports": (folder / "model").is_dir(),
        "loads": loads(folder),
    }
    shutil.rmtree(folder)
    return found


def read_cells(folder: Path) -> dict[str, Cell]:
    """Return the finished cells by lever and strategy."""
    file = folder / "cells.json"
    return json.loads(file.read_text()) if file.exists() else {}


def shown(found: Cell, reasons: list[str]) -> str:
    if found.get("code") == 2:
        why = found["why"]
        if why not in reasons:
            reasons.append(why)
        return f"no ({reasons.index(why) + 1})"
    missing = [name for name in CHECKS if not found.get(name)]
    return f"not: {', '.join(missing)}" if missing else "all"


def table(cells: dict[str, Cell]) -> str:
    reasons: list[str] = []
    lines = [f"| lever | {' | '.join(STRATEGIES)} |", f"|{'---|' * (len(STRATEGIES) + 1)}"]
    for lever in LEVERS:
        lines.append(f"| {lever} | {' | '.join(shown(cells[f'{lever} / {s}'], reasons) for s in STRATEGIES)} |")
    return "\n".join([*lines, "", *(f"({i + 1}) {why}  " for i, why in enumerate(reasons))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=LEVERS, help="a lever; may be given several times")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="some of them; equal needs those of single")
    parser.add_argument("--folder", type=Path, default=Path("outputs/means-matrix"))
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for lever in given.only or LEVERS:
        for strategy in given.strategies.split(","):
            name, words = f"{lever} / {strategy}", [*STRATEGIES[strategy], *LEVERS[lever]]
            cells = read_cells(folder)
            if cells.get(name, {}).get("words") == words:
                continue
            single = None if strategy == "single" else cells.get(f"{lever} / single", {})
            found = cell(folder / f"run-{os.getpid()}", words, single) | {"words": words}
            (folder / "cells.json").write_text(json.dumps(read_cells(folder) | {name: found}, indent=1))
            print(name, shown(found, []), found.get("why", ""), flush=True)
    cells = read_cells(folder)
    if {f"{lever} / {strategy}" for lever in LEVERS for strategy in STRATEGIES} <= cells.keys():
        page, text = PAGE.read_text(), table(cells)
        print(text)
        PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + text + page[page.index(END) :])


if __name__ == "__main__":
    main()
