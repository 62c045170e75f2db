"""Which lever works under which strategy: docs/means.md, from runs of a model of two blocks of the shipped sample.

    python scripts/make_means_matrix.py [--only lora --only expand] [--strategies single,fsdp] [--folder outputs/means-matrix]

Each cell is a run of 4 steps with a checkpoint at step 2, in two processes (single: one) on the CPU. It answers, in this order:

runs      the run finishes. If it ends with a `UserError`, the cell shows its message, which is the documented reason of a hole
equal     the losses of its evaluations equal those of one process (relative difference below 1e-4)
resumes   what is left at step 2 ends with the same records, weights and moments as the uninterrupted run, bit for bit
exports   model/ is there
loads     plain `from_pretrained` reads it with no weight missing or unknown; lora: PEFT reads adapter/ with the same logits

Each process calls `pretrain.train`, as a worker of torchrun, and is forked from one that has imported everything.
FOLDER/cells.json keeps the finished cells, so that the same command
continues what was stopped, and two commands can share the work; delete it to run everything again. The page is written once
every cell is there, or with --page from those that are there (– stands for the others).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs/means.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"
COMMON = [
    "sequence_length=64",
    "max_steps=4",
    "save_every=2",
    "evaluate_every=4",
    "log_every=1",
    "lr=1e-3",
    "sink=[jsonl]",
]
COMMON += ["checkpoint.keep_last=2", "evaluation.samples=0", "evaluation.kl_tokens=0", "evaluation.in_context=false"]
COMMON += ["dataset=local", "dataset@evaluation.domains.base=local", "evaluation.max_tokens=256"]
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
    "float8": ["transform=[float8]", "model.compile=true"],
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
LONGEST = 300  # seconds of a run
FORK = multiprocessing.get_context("fork")
CHECKS = ("runs", "equal", "resumes", "exports", "loads")
Cell = dict[str, Any]


def prepare(folder: Path) -> list[str]:
    """Write the model and the texts of the runs into ``folder``; return the words that choose them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, texts = folder / "model", {name: folder / f"{name}.jsonl" for name in ("new", "base")}
    if not model.exists():
        sample = ROOT / "pretrain/models/sample"
        AutoTokenizer.from_pretrained(sample).save_pretrained(model)
        AutoModelForCausalLM.from_pretrained(sample, num_hidden_layers=2, dtype="float32").save_pretrained(model)
    if not texts["base"].exists():
        write_texts(texts)
    words = [f"dataset.nameOrPath={texts['new']}", f"evaluation.domains.base.nameOrPath={texts['base']}"]
    return [*words, f"model_name={model}"]


def write_texts(texts: dict[str, Path]) -> None:
    pages = {"new": (ROOT / "docs").glob("*.md"), "base": ROOT.glob("*.md")}
    for name, file in texts.items():
        paragraphs = [
            text for page in sorted(pages[name]) for text in page.read_text().split("\n\n") if len(text) > 200
        ]
        file.write_text("".join(json.dumps({"text": text[:1000]}) + "\n" for text in paragraphs[:300]))


def preload() -> None:
    """Import what the processes need, once."""
    import pretrain.launch.preload
    import pretrain.strategy.deepspeed_engine  # noqa: F401


def run(config: RunConfig, size: int) -> tuple[int, str]:
    """Run to the end in ``size`` processes, or resume what is there; return the exit code of a command, and its error."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers, processes = [], []
    for rank in range(size):
        answer, end = multiprocessing.Pipe(duplex=False)
        processes.append(FORK.Process(target=work, args=(config, rank, size, port, end)))
        processes[-1].start()
        end.close()
        answers.append(answer)
    found = [answer_of(answer) for answer in answers]
    for process in processes:
        process.join(5)
        process.kill()
    return max(found, key=lambda f: (f[0] == 2, f[0]))


def answer_of(answer: Connection) -> tuple[int, str]:
    try:
        return answer.recv() if answer.poll(LONGEST) else (1, f"no answer in {LONGEST} seconds")
    except EOFError:
        return 1, "a process has died"


def work(config: RunConfig, rank: int, size: int, port: int, answer: Connection) -> None:
    """Train as one process of ``size``; answer what `run` returns."""
    import pretrain

    if size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        result = pretrain.train(config)
        answer.send((0 if result.status == "finished" else 1, result.status))
    except pretrain.UserError as error:
        answer.send((2, str(error)))
    except BaseException as error:
        answer.send((1, f"{type(error).__name__}: {error} at {traceback.format_tb(error.__traceback__)[-1].strip()}"))
    os._exit(0)  # not what belongs to the process that it was forked from


def evaluations(folder: Path) -> dict[str, float]:
    """Return the loss of each evaluation by domain and step."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {f"{r['domain']} {r['step']}": r["loss"] for r in records if r["event"] == "evaluation"}


def is_equal(ours: dict[str, float], single: dict[str, float]) -> bool:
    return ours.keys() == single.keys() and all(abs(ours[k] / single[k] - 1) < 1e-4 for k in ours)


def resumes(folder: Path, config: RunConfig, size: int) -> str:
    """Return how the run, cut off at step 2, ends otherwise than the uninterrupted one; nothing if it ends as that one."""
    from tests.runs import assert_same_run

    whole = folder.with_name(f"{folder.name}-whole")
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    ends = [
        *(folder / "checkpoints").glob("step-*[0-9]"),
        *(folder / name for name in ("model", "adapter", "averages")),
    ]
    for later in ends:
        if not later.name.endswith(f"{CUT:08d}"):
            shutil.rmtree(later, ignore_errors=True)
    try:
        code, error = run(config, size)
        if code:
            return error
        assert_same_run(folder, whole)
    except AssertionError as difference:
        return f"resumed it differs: {str(difference)[:300]}"
    finally:
        shutil.rmtree(whole)
    return ""


def loads(folder: Path, model_name: Path) -> bool:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"] or info["unexpected_keys"]:
        return False
    if not (folder / "adapter").exists():
        return True
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    adapted, ids = PeftModel.from_pretrained(base, folder / "adapter").eval(), torch.arange(32)[None]
    with torch.no_grad():
        return bool(torch.allclose(adapted(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4))


def cell(folder: Path, words: list[str], single: Cell | None) -> Cell:
    """Run one cell in ``folder``, which is removed again. ``single``: the cell of one process; ``None``: it is this one."""
    import pretrain

    shutil.rmtree(folder, ignore_errors=True)
    size = 2 if "devices=2" in words and "strategy=dp" not in words else 1
    try:
        config = pretrain.compose([*COMMON, *words, f"output_dir={folder}"])
        code, error = run(config, size)
    except pretrain.UserError as mistake:
        code, error = 2, str(mistake)
    if code:
        return {"runs": False, "code": code, "why": error}
    losses = evaluations(folder)
    why = resumes(folder, config, size)
    exports = (folder / "model").is_dir()
    equal = is_equal(losses, (single or {"losses": losses}).get("losses", {}))
    found = {"runs": True, "losses": losses, "equal": equal, "resumes": not why, "why": why, "exports": exports}
    found["loads"] = exports and loads(folder, folder.parent / "model")
    shutil.rmtree(folder)
    return found


def read_cells(folder: Path) -> dict[str, Cell]:
    """Return the finished cells by lever and strategy."""
    file = folder / "cells.json"
    return json.loads(file.read_text()) if file.exists() else {}


def shown(found: Cell, reasons: list[str]) -> str:
    if not found:
        return "–"
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
        lines.append(f"| {lever} | {' | '.join(shown(cells.get(f'{lever} / {s}', {}), reasons) for s in STRATEGIES)} |")
    return "\n".join([*lines, "", *(f"({i + 1}) {why}  " for i, why in enumerate(reasons))]) + "\n"


def fill(folder: Path, levers: list[str], strategies: list[str]) -> None:
    """Run the cells that are missing."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    preload()
    common = prepare(folder)
    for lever in levers:
        for strategy in strategies:
            name, words = f"{lever} / {strategy}", [*STRATEGIES[strategy], *LEVERS[lever]]
            cells = read_cells(folder)
            if cells.get(name, {}).get("words") == words:
                continue
            single = None if strategy == "single" else cells.get(f"{lever} / single", {})
            found = cell(folder / f"run-{os.getpid()}", [*common, *words], single) | {"words": words}
            (folder / "cells.json").write_text(json.dumps(read_cells(folder) | {name: found}, indent=1))
            print(name, shown(found, []), found.get("why", ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=LEVERS, help="a lever; may be given several times")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="some of them; equal needs those of single")
    parser.add_argument("--folder", type=Path, default=Path("outputs/means-matrix"))
    parser.add_argument("--page", action="store_true", help="run nothing, write the page from the finished cells")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not given.page:
        fill(folder, given.only or list(LEVERS), given.strategies.split(","))
    cells = read_cells(folder)
    if given.page or {f"{lever} / {strategy}" for lever in LEVERS for strategy in STRATEGIES} <= cells.keys():
        page, text = PAGE.read_text(), table(cells)
        print(text)
        PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + text + page[page.index(END) :])


if __name__ == "__main__":
    main()
