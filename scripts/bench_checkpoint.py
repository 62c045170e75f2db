"""How long a checkpoint blocks training, and how long it takes until it is on disk.

    python scripts/bench_checkpoint.py [--rounds 5] [--folder DIR]

A Llama of about 50 M fp32 parameters with AdamW's moments, one process. In every round each of these saves the same model
and optimizer into a folder on the same disk, one after the other:

ours        what the loop does: state, copy in host memory, a thread that writes, checksums, flushes (fsync) and renames
ours, sync  the same with checkpoint.async=false
torch.save  {model, optimizer} into one file, not flushed
DCP         torch.distributed.checkpoint.save, not flushed
DCP async   torch.distributed.checkpoint.async_save, not flushed
Trainer     the Hugging Face Trainer's save (save_steps=1), by its callbacks' clock; needs `pip install accelerate`

blocked: until training could go on. total: until the files are there. The first round, in which everybody allocates, is
shown apart; then medians, and ratios of each round to torch.save's in it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program does on a CPU

import torch
import torch.distributed.checkpoint as dcp
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.rng import rng_state
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import AsyncCheckpointWriter
from pretrain.distributed.context import DistributedContext
from pretrain.models.language_model import LanguageModel
from pretrain.strategy.engine import Engine
from pretrain.strategy.precision import Precision

WORLD = DistributedContext()
CONFIG = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10}
CONFIG |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128}
IDS = torch.arange(32).reshape(1, 32)


class Took(NamedTuple):
    """Seconds."""

    blocked: float
    total: float


Save = Callable[[Path, int], Took]


def timed(save: Callable[[], Callable[[], Any]]) -> Took:
    """``save`` starts a save and returns what waits for its end."""
    started_at = time.perf_counter()
    wait = save()
    blocked = time.perf_counter() - started_at
    wait()
    return Took(blocked, time.perf_counter() - started_at)


def at_once(save: Callable[[], Any]) -> Took:
    def run() -> Callable[[], None]:
        save()
        return lambda: None

    return timed(run)


# The contestants -------------------------------------------------------------------------------------------------------


def ours(engine: Engine, *, background: bool) -> Save:
    savers: list[AsyncCheckpointWriter] = []

    def save(folder: Path, number: int) -> Took:
        if not savers:
            store = CheckpointStore(folder / f"ours-{background}", CheckpointConfig(keep_last=1))
            savers.append(AsyncCheckpointWriter(store, world=WORLD, background=background))
        saver = savers[0]

        def start() -> Callable[[], None]:
            progress = {"step": number, "evaluated_at": -1}
            state = {"engine": engine.state_dict(), "progress": progress, "rng": [rng_state()]}
            saver.save(number, state, at_once=False)
            return saver.wait

        return timed(start)

    return save


def torch_save(engine: Engine) -> Save:
    def save(folder: Path, number: int) -> Took:
        file = folder / "torch.pt"
        return at_once(
            lambda: torch.save({"model": engine.model.state_dict(), "optimizer": engine.optimizer.state_dict()}, file)
        )

    return save


def distributed(engine: Engine, *, background: bool) -> Save:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    def save(folder: Path, number: int) -> Took:
        shutil.rmtree(folder / "dcp", ignore_errors=True)

        def start() -> Callable[[], Any]:
            model, optimizer = get_state_dict(engine.model, engine.optimizer)
            state = {"model": model, "optimizer": optimizer}
            if not background:
                dcp.save(state, checkpoint_id=folder / "dcp")
                return lambda: None
            return dcp.async_save(state, checkpoint_id=folder / "dcp").result

        return timed(start)

    return save


def trainer(engine: Engine) -> Save:
    """One step of the Trainer for each save; its clock runs from the step's end to the save's."""

    class Clock(TrainerCallback):  # type: ignore[misc]
        step_end = saved = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.step_end = time.perf_counter()

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            self.saved = time.perf_counter()

    def save(folder: Path, number: int) -> Took:
        clock = Clock()
        settings = TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=1,
            max_steps=1,
            save_steps=1,
            save_total_limit=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = [{"input_ids": IDS[0], "labels": IDS[0]}]
        Trainer(engine.model.hf, settings, train_dataset=data, callbacks=[clock]).train()
        return Took(clock.saved - clock.step_end, clock.saved - clock.step_end)

    return save


# The measurement -------------------------------------------------------------------------------------------------------


def build_engine() -> Engine:
    torch.manual_seed(0)
    model = LanguageModel(LlamaForCausalLM(LlamaConfig(**CONFIG)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = Engine(model, optimizer, precision=Precision("32-true", "float32", "float32"), world=WORLD)
    model(IDS, IDS).backward()
    engine.step(1.0)
    return engine


def rounds(contestants: dict[str, Save], folder: Path, count: int) -> Iterator[dict[str, Took]]:
    for number in range(1, count + 2):
        took = {}
        for name, save in contestants.items():
            os.sync()  # nobody waits for what another has left to be flushed
            took[name] = save(folder, number)
        yield took


def table(names: list[str], measured: list[dict[str, Took]]) -> Iterator[str]:
    first, later = measured[0], measured[1:]
    yield "| | blocked s | × torch.save | total s | × torch.save | first: blocked s |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        cells = [name]
        for pick in (lambda took: took.blocked, lambda took: took.total):
            cells.append(f"{statistics.median(pick(r[name]) for r in later):.3f}")
            cells.append(f"{statistics.median(pick(r[name]) / r['torch.save'].total for r in later):.2f}")
        yield "| " + " | ".join([*cells, f"{first[name].blocked:.3f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="after a first one")
    parser.add_argument("--folder", type=Path, help="where to write; a new folder in it is used (default: TMPDIR)")
    asked = parser.parse_args()
    engine = build_engine()
    contestants = {
        "ours": ours(engine, background=True),
        "ours, sync": ours(engine, background=False),
        "torch.save": torch_save(engine),
        "DCP": distributed(engine, background=False),
        "DCP async": distributed(engine, background=True),
    }
    if importlib.util.find_spec("accelerate"):
        contestants["Trainer"] = trainer(engine)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        measured = list(rounds(contestants, Path(folder), asked.rounds))
    held = sum(p.numel() for p in engine.model.parameters())
    print(f"{held / 1e6:.1f} M parameters, {asked.rounds} rounds after the first, {torch.get_num_threads()} threads\n")
    print("\n".join(table(list(contestants), measured)))


if __name__ == "__main__":
    main()
