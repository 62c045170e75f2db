"""Which lever works under which strategy: docs/means.md, from runs of the shipped sample.

    OMP_NUM_THREADS=1 python scripts/make_means_matrix.py [--only lora --only expand] [--strategies single,fsdp] [--keep FOLDER]

Each cell is a run of 6 steps with a checkpoint at step 3, in two processes (single: one) on the CPU. It answers, in this order:

runs      the command ends with 0; otherwise the cell shows its error, which is the documented reason of a hole
equal     the losses of its evaluations equal those of one process (relative difference below 1e-4)
resumes   what is left at step 3 ends with the same records, weights and moments as the uninterrupted run, bit for bit
exports   model/ is there
loads     plain `from_pretrained` reads it with no weight missing or unknown; lora: PEFT reads adapter/ with the same logits
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/means.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
COMMON = [
    "sequence_length=64",
    "max_steps=6",
    "save_every=3",
    "evaluate_every=6",
    "log_every=1",
    "checkpoint.keep_last=2",
]
COMMON += ["evaluation.max_tokens=2000", "evaluation.samples=0", "sink=[jsonl]", "lr=1e-3"]
LEVERS = {
    "none": [],
    "freeze": ["transform=[freeze]", "transform.freeze.frozen=embed"],
    "freeze, thawed": ["transform=[freeze]", "transform.freeze.trainable=embed", "transform.freeze.thaw_at=0.6"],
    "lr_multipliers": ["optimizer.lr_multipliers={embed: 0.1}", "optimizer.layer_decay=0.9"],
    "lora": ["transform=[lora]", "transform.lora.rank=8"],
    "lora, dora": ["transform=[lora]", "transform.lora.rank=8", "transform.lora.dora=true"],
    "expand": ["transform=[expand]", "transform.expand.blocks=1"],
    "vocabulary": ["transform=[vocabulary]", "transform.vocabulary.size=100"],
    "vocabulary, new rows": [
        *("transform=[vocabulary]", "transform.vocabulary.size=100", "transform.vocabulary.only_new_rows=true"),
    ],
    "overrides": ["model.overrides={rope_scaling: {rope_type: linear, factor: 2.0}}"],
}
STRATEGIES = {
    "single": ["strategy=single", "batch_size=4"],
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
    **{f"ZeRO {stage}": ["strategy=deepspeed", f"strategy.zero_stage={stage}"] for stage in range(4)},
}
CHECKS = ("runs", "equal", "resumes", "exports", "loads")


def run(folder: Path, words: list[str]) -> str | None:
    """Run a command; return its error line, or ``None`` if it has finished."""
    command = [sys.executable, "-m", "pretrain", *COMMON, *words, f"output_dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])


def evaluations(folder: Path) -> dict[tuple[str, int], float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(r["domain"], r["step"]): r["loss"] for r in records if r["event"] == "evaluation"}


def is_equal(folder: Path, single: Path) -> bool:
    ours, theirs = evaluations(folder), evaluations(single)
    return ours.keys() == theirs.keys() and all(abs(ours[k] / theirs[k] - 1) < 1e-4 for k in ours)


def resumes(folder: Path, words: list[str]) -> bool:
    """Return whether the run that is cut off at step 3 ends as the uninterrupted one."""
    sys.path.insert(0, str(ROOT))
    from tests.runs import assert_same_run

    again = folder.with_name(f"{folder.name}-again")
    shutil.copytree(folder, again)
    for name in ("checkpoints/step-00000006", "model", "adapter"):
        shutil.rmtree(again / name, ignore_errors=True)
    if run(again, words) is not None:
        return False
    try:
        assert_same_run(again, folder)
    except AssertionError:
        return False
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


def cell(lever: str, strategy: str, runs: Path) -> dict[str, Any]:
    folder, words = runs / f"{lever}-{strategy}".replace(" ", "_"), [*STRATEGIES[strategy], *LEVERS[lever]]
    if strategy != "single":
        words += ["devices=2", "batch_size=2"]
    error = run(folder, words)
    if error is not None:
        return {"runs": False, "why": error}
    return {
        "runs": True,
        "equal": is_equal(folder, runs / f"{lever}-single".replace(" ", "_")),
        "resumes": resumes(folder, words),
        "exports": (folder / "model").is_dir(),
        "loads": loads(folder),
    }


def shown(found: dict[str, Any], reasons: list[str]) -> str:
    if not found["runs"]:
        why = found["why"].replace(tempfile.gettempdir(), "…")
        if why not in reasons:
            reasons.append(why)
        return f"no ({reasons.index(why) + 1})"
    missing = [name for name in CHECKS if not found[name]]
    return f"not: {', '.join(missing)}" if missing else "all"


def table(cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    reasons: list[str] = []
    strategies = list(next(iter(cells.values())))
    lines = [f"| lever | {' | '.join(strategies)} |", f"|{'---|' * (len(strategies) + 1)}"]
    for lever, row in cells.items():
        lines.append(f"| {lever} | {' | '.join(shown(row[s], reasons) for s in strategies)} |")
    return "\n".join([*lines, "", *(f"({i + 1}) {why}  " for i, why in enumerate(reasons))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=LEVERS, help="a lever; may be given several times")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--keep", help="a folder for the runs; default: a temporary one")
    given = parser.parse_args()
    levers = given.only or list(LEVERS)
    os.environ.setdefault("PRETRAIN_CACHE", tempfile.mkdtemp())
    runs = Path(given.keep or tempfile.mkdtemp())
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for lever in levers:
        cells[lever] = {}
        for strategy in given.strategies.split(","):
            cells[lever][strategy] = cell(lever, strategy, runs)
            print(lever, strategy, cells[lever][strategy], flush=True)
    text = table(cells)
    print(text)
    if PAGE.exists() and set(levers) == set(LEVERS):
        page = PAGE.read_text()
        PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + text + page[page.index(END) :])


if __name__ == "__main__":
    main()
