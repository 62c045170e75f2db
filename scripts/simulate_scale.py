"""Set a large model up as one rank of 64 or 1,024, without GPUs, weights and other ranks, and print what that rank would do.

    python scripts/simulate_scale.py                        # the table of docs/strategies.md: a Llama of 8 B and one of 70 B
    python scripts/simulate_scale.py --models tiny --ranks 64

The process group is torch's `fake` one, and tensors have sizes and no memory (`pretrain.plan`). The strategies are the real
ones; of DeepSpeed, which can't run on such tensors, memory and traffic are estimated (`pretrain.plan.zero`). Memory and bytes
are those of rank 0 in bf16-mixed with activation checkpointing and sequences of 4,096 tokens, one per micro-batch.

A resume is simulated with a checkpoint whose files have real headers and no content (sparse files): `load` and the readers of
a run open them as rank 0, the middle rank and the last one, of which the largest numbers are shown. Written: by the rank that
writes most. Seconds are processor time of one rank: for the setup of model and strategy; for the check of the checkpoint by all
ranks together and the headers of the files that it reads; and, alone, for the check of all files by one process.
"""

from __future__ import annotations

import argparse
import json
import math
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
    *("model", "strategy", "ranks", "static GiB", "peak GiB", "gathered GiB", "reduced GiB", "checkpoint GiB", "files"),
    *("written GiB", "read GiB", "opened", "setup s", "resume s", "alone s"),
)
Rows = dict[str, dict[str, tuple[int, int]]]  # kind → name → first row, and the row after the last one
MOMENTS = ("exp_avg", "exp_avg_sq")


def rows(models: list[str], strategies: list[str], ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the row of each combination. A strategy may be followed by ZeRO's stage, as deepspeed1."""
    for model in models:
        for strategy in strategies:
            for size in ranks:
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
                    yield simulated(model, Path(folder), strategy, size)


def simulated(model: str, folder: Path, strategy: str, ranks: int) -> dict[str, Any]:
    """Return the row of one combination."""
    from pretrain.distributed.topology import Topology
    from pretrain.plan.devices import DEVICES
    from pretrain.run.planning import plan_of

    name = strategy.rstrip("0123")
    words = [f"model_name={folder}", "sequence_length=4096", "batch_size=1", f"strategy={name}", "task=plan"]
    words += ["precision=bf16-mixed", "model.gradient_checkpointing=true", "plan.devices=[]"]
    config = pretrain.compose([*words, *([f"strategy.zero_stage={strategy[-1]}"] if name == "deepspeed" else [])])
    topology = Topology("cuda", PER_NODE, ranks // PER_NODE)
    plan = plan_of(config, device=DEVICES["H100"], topology=topology, compare=False)
    found: dict[str, Any] = {"model": model, "strategy": strategy, "ranks": ranks}
    found |= {
        "static GiB": sum(plan.between_steps.values()),
        "peak GiB": plan.peak_bytes,
        "gathered GiB": plan.communicated.get("gathered", 0.0),
        "reduced GiB": plan.communicated.get("reduced", 0.0),
    }
    found |= saved_and_read(described(config), strategy, ranks, folder / "step-00000000")
    found |= {key: None if found[key] is None else found[key] / 2**30 for key in found if key.endswith("GiB")}
    return found | {"setup s": setup_seconds(config, topology)}


# A checkpoint and its resume ------------------------------------------------------------------------------------------


def described(config: Any) -> dict[str, Any]:
    """Return dtype and shape of every tensor in a checkpoint of AdamW, by kind and name."""
    from pretrain.models.model_factory import ModelFactory
    from pretrain.plan.traced_model import traced_spec

    model = ModelFactory(traced_spec(config.model), config.precision.param_dtype, config.seed).build_on_meta()
    shapes = {name: list(tensor.shape) for name, tensor in model.hf_state().items()}
    moments = {f"{name}/{key}": shape for name, shape in shapes.items() for key in MOMENTS}
    found = {"model": shapes, "optimizer": moments | {f"{name}/step": [] for name in shapes}}
    return {kind: {name: ("float32", shape) for name, shape in named.items()} for kind, named in found.items()}


def written_by(rank: int, ranks: int, manifest: dict[str, Any], owners: dict[str, Any]) -> Rows:
    """Return the rows that a rank writes: those of its tensors in ``owners``, or else equal parts along dim 0."""
    found: Rows = {kind: {} for kind in manifest}
    for kind, named in manifest.items():
        for name, (_, shape) in named.items():
            if owners or not shape:
                if owners.get(kind, {}).get(name, 0) == rank:
                    found[kind][name] = (0, (shape or [1])[0])
            elif (part := equal_part(rank, ranks, shape[0]))[0] < part[1]:
                found[kind][name] = part
    return found


def equal_part(rank: int, ranks: int, count: int) -> tuple[int, int]:
    """Return the first of ``count`` rows that a rank has, and the one after the last, as FSDP shards them."""
    size = -(-count // ranks)
    return min(rank * size, count), min((rank + 1) * size, count)


def read_by(rank: int, ranks: int, manifest: dict[str, Any], strategy: str) -> Rows:
    """Return the rows that a rank reads: all of them (ddp), its part of each tensor (fsdp), of each flattened tensor (ZeRO 3),
    or of all tensors one after the other (ZeRO 1 and 2)."""
    found: Rows = {kind: {} for kind in manifest}
    total = sum(math.prod(shape) for _, shape in manifest["model"].values())
    starts: dict[str, int] = {}
    place = 0
    for name, (_, shape) in manifest["model"].items():
        starts[name], place = place, place + math.prod(shape)
    for kind, named in manifest.items():
        for name, (_, shape) in named.items():
            count, width = (shape or [1])[0], math.prod(shape[1:])
            first, stop = 0, count
            if shape and strategy == "fsdp":
                first, stop = equal_part(rank, ranks, count)
            elif shape and strategy.startswith("deepspeed"):
                first, stop = equal_part(rank, ranks, count * width if strategy == "deepspeed3" else total)
                before = 0 if strategy == "deepspeed3" else starts[name.partition("/")[0]]
                first, stop = max(first - before, 0) // width, min(-(-max(stop - before, 0) // width), count)
            if first < stop:
                found[kind][name] = (first, stop)
    if strategy.startswith("deepspeed"):  # one step counter stands for all
        steps = [name for name in found["optimizer"] if name.endswith("/step")]
        found["optimizer"] = {n: rows for n, rows in found["optimizer"].items() if n not in steps[1:]}
    return found


def owners_of(manifest: dict[str, Any], strategy: str, ranks: int) -> dict[str, Any]:
    """Return the ranks that write full tensors, as the strategies choose them."""
    import torch

    from pretrain.distributed.sharding import writers

    if strategy == "ddp":
        meta = {k: {n: torch.empty(shape, device="meta") for n, (_, shape) in v.items()} for k, v in manifest.items()}
        return {kind: writers(named, ranks) or dict.fromkeys(named, 0) for kind, named in meta.items()}
    if strategy in ("deepspeed1", "deepspeed2"):
        every = [(kind, name, shape) for kind, named in manifest.items() for name, (_, shape) in named.items()]
        return {
            kind: {n: i % ranks if shape else 0 for i, (k, n, shape) in enumerate(every) if k == kind}
            for kind in manifest
        }
    return {}


def saved_and_read(manifest: dict[str, Any], strategy: str, ranks: int, path: Path) -> dict[str, Any]:
    """Write a checkpoint without content in ``path`` and read it; return the cells about it."""
    from pretrain.checkpoint.schema import validation_error

    owners = owners_of(manifest, strategy, ranks)
    path.mkdir()
    sizes = [write_sparse(path, rank, manifest, written_by(rank, ranks, manifest, owners)) for rank in range(ranks)]
    complete(path, manifest, owners, ranks)
    started = time.process_time()
    reason = validation_error(path)
    alone = time.process_time() - started
    assert reason is None, reason
    resumes = [
        resumed(path, rank, ranks, read_by(rank, ranks, manifest, strategy)) for rank in (0, ranks // 2, ranks - 1)
    ]
    return {
        "checkpoint GiB": sum(sizes),
        "files": len(list(path.glob("*.safetensors"))),
        "written GiB": max(sizes),
        **{key: max(one[key] for one in resumes) for key in resumes[0]},
        "alone s": alone,
    }


def write_sparse(folder: Path, rank: int, manifest: dict[str, Any], own: Rows) -> int:
    """Write the files of one rank with zeros that need no disk; return the bytes of their tensors."""
    total = 0
    for kind, named in own.items():
        header: dict[str, Any] = {}
        pieces, offset = {}, 0
        for name, (first, stop) in named.items():
            shape = manifest[kind][name][1]
            shard = [stop - first, *shape[1:]] if shape else []
            end = offset + 4 * math.prod(shard)
            header[name] = {"dtype": "F32", "shape": shard, "data_offsets": [offset, end]}
            if shard != shape:
                pieces[name] = [first, shape]
            offset = end
        if not header:
            continue
        text = json.dumps({"__metadata__": {"format": "pt", "pieces": json.dumps(pieces)}} | header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / f"{kind}.rank-{rank}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        total += offset
    return total


def complete(folder: Path, manifest: dict[str, Any], owners: dict[str, Any], ranks: int) -> None:
    """Write state.json and the marker of a checkpoint. The full checksums of large files, which no resume reads, are made up."""
    from pretrain.checkpoint.marker import SMALL_BYTES, entry_of, quick_checksum, write_marker
    from pretrain.checkpoint.rng import rng_state

    identity = dict.fromkeys(("model", "tokenizer", "data", "weights"), "x") | {"seed": 0, "optimizer": []}
    state = {
        "identity": identity | {"sequence_length": 4096, "global_batch": ranks},
        "loader": {"samples": 0},
        "progress": {"step": 0, "samples": 0, "tokens": 0},
        "scaler": {},
        "rng": [rng_state()] * ranks,
        "ranks": ranks,
        "tensors": manifest,
        "owners": owners,
    }
    (folder / "state.json").write_text(json.dumps(state))
    entries = {}
    for file in sorted(folder.iterdir()):
        large = file.suffix == ".safetensors" and file.stat().st_size > SMALL_BYTES
        made_up = {"bytes": file.stat().st_size, "xxh3_128": "0" * 32}
        entries[file.name] = made_up | {"quick_xxh3_128": quick_checksum(file)} if large else entry_of(file)
    write_marker(folder, entries)


def resumed(path: Path, rank: int, ranks: int, own: Rows) -> dict[str, Any]:
    """Return the bytes that a rank reads from a checkpoint, the files that it opens for them, and its processor time without the
    bytes."""
    from pretrain.checkpoint.store import load
    from pretrain.distributed.sharding import TensorFiles
    from pretrain.distributed.topology import Topology
    from pretrain.plan.simulation import SimulatedContext
    from pretrain.plan.torch_internals import replaced

    read, started = 0, time.process_time()

    def count(files: Any, into: Any, *place: Any) -> None:
        nonlocal read
        read += into.nbytes

    class OfAll(SimulatedContext):
        def sum(self, value: Any) -> Any:
            return value * 0  # of the hashes of all ranks, if the checkpoint is complete

    world = OfAll(rank, Topology(workers_per_node=PER_NODE, nodes=ranks // PER_NODE))
    with replaced(TensorFiles, _read_rows=count):
        engine = load(path, world=world)["engine"]
        for kind, named in own.items():
            for name, (first, stop) in named.items():
                engine[kind].read(name, first, stop)
    opened = sum(len(engine[kind].opened()) for kind in own)
    return {"read GiB": read, "opened": opened, "resume s": time.process_time() - started}


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
    parser.add_argument("--strategies", default="fsdp,ddp,deepspeed1,deepspeed2,deepspeed3")
    parser.add_argument("--ranks", default="64,1024", help=f"multiples of {PER_NODE}")
    parser.add_argument(
        "--no-batches", action="store_true", help="do not compare the batches of all ranks with those of one"
    )
    given = parser.parse_args()
    ranks = [int(n) for n in given.ranks.split(",")]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for row in rows(given.models.split(","), given.strategies.split(","), ranks):
        cells = (
            "—" if row[c] is None else f"{row[c]:,.2f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    for n in [] if given.no_batches else ranks:
        print(
            f"batches of {n} ranks together equal those of one rank: {'yes' if same_batches(n) else 'NO'}", flush=True
        )


if __name__ == "__main__":
    main()
