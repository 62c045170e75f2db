"""Set a large model up as one rank of 64 or 1,024, without GPUs, weights and other ranks, and print what that rank would do.

    python scripts/simulate_scale.py                        # the table of docs/strategies.md: a Llama of 8 B and one of 70 B
    python scripts/simulate_scale.py --models tiny --ranks 64

The process group is torch's `fake` one, and tensors have sizes and no memory (`pretrain.plan`). The strategies are the real ones;
of DeepSpeed, which can't run on such tensors, the memory is estimated. Memory and bytes are those of rank 0 in bf16-mixed with
activation checkpointing and sequences of 4,096 tokens, one per micro-batch. Files are those of a checkpoint, opened are the files
that each rank opens at a resume. Seconds are processor time of rank 0 for the setup of model and strategy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretrain

LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False}
MODELS = {
    "tiny": LLAMA
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
    | {"num_key_value_heads": 2},
    "8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8},
    "70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
}
PER_NODE = 8
COLUMNS = (
    *(
        "model",
        "strategy",
        "ranks",
        "static GiB",
        "peak GiB",
        "gathered GiB",
        "reduced GiB",
        "checkpoint GiB",
        "written GiB",
    ),
    *("files", "opened", "setup s"),
)


def rows(models: list[str], strategies: list[str], ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the row of each combination."""
    for model in models:
        for strategy in strategies:
            for size in ranks:
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
                    yield simulated(model, folder, strategy, size)


def simulated(model: str, folder: str, strategy: str, ranks: int) -> dict[str, Any]:
    """Return the row of one combination."""
    from pretrain.distributed.topology import Topology
    from pretrain.plan.devices import DEVICES
    from pretrain.run.planning import plan_of

    words = [f"model_name={folder}", "sequence_length=4096", "batch_size=1", f"strategy={strategy}", "task=plan"]
    words += ["precision=bf16-mixed", "model.gradient_checkpointing=true", "plan.devices=[]"]
    config = pretrain.compose([*words, *(["strategy.zero_stage=3"] if strategy == "deepspeed" else [])])
    topology = Topology("cuda", PER_NODE, ranks // PER_NODE)
    plan = plan_of(config, device=DEVICES["H100"], topology=topology, compare=False)
    files = int(plan.checkpoint["files"])
    numbers = {
        "static GiB": sum(plan.between_steps.values()),
        "peak GiB": plan.peak_bytes,
        "gathered GiB": plan.communicated.get("gathered", 0.0),
        "reduced GiB": plan.communicated.get("reduced", 0.0),
        "checkpoint GiB": plan.checkpoint["bytes"],
        "written GiB": plan.checkpoint["bytes_per_process"],
    }
    found: dict[str, Any] = {"model": model, "strategy": strategy, "ranks": ranks}
    found |= {name: None if size is None else size / 2**30 for name, size in numbers.items()}
    return found | {"files": files, "opened": files, "setup s": setup_seconds(config, topology)}


def setup_seconds(config: Any, topology: Any) -> float | None:
    """Return the processor time of rank 0 for building the whole model and the strategy's engine; ``None`` for DeepSpeed."""
    import torch

    from pretrain.plan.simulation import SimulatedContext
    from pretrain.plan.torch_internals import fake_tensors, simulated_group
    from pretrain.plan.traced_model import TracedFactory, traced_spec
    from pretrain.run.build import optimizer_builder
    from pretrain.strategy.base import StepConfig

    if config.strategy.name == "deepspeed":
        return None
    config = config.with_lr(1.0)
    started = time.process_time()
    with simulated_group(0, topology.world_size), fake_tensors():
        factory = TracedFactory(traced_spec(config.model), config.precision.param_dtype, config.seed, fused_loss=True)
        world = SimulatedContext(0, topology, torch.device("cpu"))
        config.strategy.setup(factory, optimizer_builder(config), StepConfig.of(config), world)
    return time.process_time() - started


def same_batches(ranks: int, *, words: tuple[str, ...] = ()) -> bool:
    """Return whether the batches of ``ranks`` ranks, put together, are those of one rank, for two steps of the sample dataset."""
    import torch

    from pretrain.data.loader import Loader
    from pretrain.run.prepare import prepare

    config = pretrain.compose(
        ["batch_size=2", "gradient_accumulation_steps=1", "sequence_length=128", "max_steps=2", *words]
    )
    train = prepare(config).train
    options: dict[str, Any] = {"sequence_length": config.sequence_length, "seed": config.seed, "steps": 2}
    alone = Loader(train, batch_size=2 * ranks, **options)
    together = [Loader(train, batch_size=2, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    return all(
        torch.equal(alone.batch(first).input_ids, torch.cat([loader.batch(first).input_ids for loader in together]))
        for first in (0, 2 * ranks)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8b,70b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--strategies", default="fsdp,ddp,deepspeed")
    parser.add_argument("--ranks", default="64,1024", help=f"multiples of {PER_NODE}")
    given = parser.parse_args()
    ranks = [int(n) for n in given.ranks.split(",")]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for row in rows(given.models.split(","), given.strategies.split(","), ranks):
        cells = (
            "—" if row[c] is None else f"{row[c]:,.2f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    for n in ranks:
        print(
            f"batches of {n} ranks together equal those of one rank: {'yes' if same_batches(n) else 'NO'}", flush=True
        )


if __name__ == "__main__":
    main()
