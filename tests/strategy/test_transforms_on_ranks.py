"""Every strategy trains the same transformed model: its weights at the start, each step, what it saves and what it loads."""

from dataclasses import replace

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.distributed import sharding as tensors
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.sharding import TensorFiles
from pretrain.models import recomputed_products
from pretrain.models.transforms.expand import Expand
from pretrain.models.transforms.freeze import Freeze as ShippedFreeze
from pretrain.models.transforms.lora import Lora as PeftLora
from pretrain.models.transforms.vocabulary import GrowRows, Vocabulary
from pretrain.optim.adamw import AdamW
from pretrain.optim.lr_factors import split_by_factor
from pretrain.strategy.base import StepConfig
from pretrain.strategy.ddp import Ddp
from pretrain.strategy.deepspeed import Deepspeed
from pretrain.strategy.fsdp import Fsdp
from pretrain.strategy.single import Single
from tests.group import together
from tests.strategy.test_precision import load
from tests.transforms import Freeze, Lora

STEPS = 2
KINDS = ("model", "optimizer")
LORA = (Lora(targets=r"[qv]_proj$|lm_head$"),)
FREEZE = (Freeze(r"embed_tokens|layers\.0\.|norm"),)
THAW = (ShippedFreeze(frozen=r"embed_tokens|layers\.0\.|norm", thaw_at=0.5),)
PEFT = (PeftLora(rank=4),)
DORA = (PeftLora(rank=4, dora=True, modules_to_save=["embeddings"], modules_to_save_lr=0.5),)
BLOCKS = (Expand(blocks=1),)
NEW_ROWS = (GrowRows(Vocabulary(size=3, only_new_rows=True), {300: (1, 2), 301: (3,), 302: (4, 5)}, 303),)
SMALL = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
NEVER_WHOLE = {
    "zero_optimization": {f"stage3_{key}": 0 for key in SMALL}
}  # each weight is gathered for its module alone
ROWS = {
    "fsdp, peft": (Fsdp(), PEFT),
    "deepspeed 3, peft": (Deepspeed(zero_stage=3), PEFT),
    "fsdp, blocks": (Fsdp(), BLOCKS),
    "fsdp, new rows": (Fsdp(), NEW_ROWS),
    "ddp, thawed": (Ddp(), THAW),
    "fsdp, thawed": (Fsdp(), THAW),
    "deepspeed 0, thawed": (Deepspeed(zero_stage=0), THAW),
    "deepspeed 2, thawed": (Deepspeed(zero_stage=2), THAW),
    "deepspeed 3, new rows": (Deepspeed(zero_stage=3), NEW_ROWS),
    "ddp": (Ddp(), LORA),
    "ddp, frozen": (Ddp(), FREEZE),
    "fsdp": (Fsdp(), LORA),
    "fsdp, frozen": (Fsdp(), FREEZE),
    "fsdp, not sharded": (Fsdp(sharding_strategy="NO_SHARD"), LORA),
    "deepspeed 0": (Deepspeed(zero_stage=0), LORA),
    "deepspeed 1": (Deepspeed(zero_stage=1), LORA),
    "deepspeed 2": (Deepspeed(zero_stage=2), FREEZE),
    "deepspeed 3": (Deepspeed(zero_stage=3), LORA),
    "deepspeed 3, frozen": (Deepspeed(zero_stage=3), FREEZE),
}
SLOW = {
    "ddp, peft": (Ddp(), PEFT),
    "fsdp, peft not sharded": (Fsdp(sharding_strategy="NO_SHARD"), PEFT),
    "deepspeed 0, peft": (Deepspeed(zero_stage=0), PEFT),
    "deepspeed 1, peft": (Deepspeed(zero_stage=1), PEFT),
    "deepspeed 2, peft": (Deepspeed(zero_stage=2), PEFT),
    "ddp, dora": (Ddp(), DORA),
    "fsdp, dora": (Fsdp(), DORA),
    "deepspeed 2, dora": (Deepspeed(zero_stage=2), DORA),
    "deepspeed 3, dora": (Deepspeed(zero_stage=3), DORA),
    "ddp, blocks": (Ddp(), BLOCKS),
    "deepspeed 2, blocks": (Deepspeed(zero_stage=2), BLOCKS),
    "deepspeed 3, blocks": (Deepspeed(zero_stage=3, config=NEVER_WHOLE), BLOCKS),
    "ddp, new rows": (Ddp(), NEW_ROWS),
    "deepspeed 0, new rows": (Deepspeed(zero_stage=0), NEW_ROWS),
    "deepspeed 1, new rows": (Deepspeed(zero_stage=1), NEW_ROWS),
    "deepspeed 2, new rows": (Deepspeed(zero_stage=2), NEW_ROWS),
    "deepspeed 1, thawed": (Deepspeed(zero_stage=1), THAW),
    "deepspeed 3, thawed": (Deepspeed(zero_stage=3), THAW),
    "deepspeed 2 on the host, thawed": (Deepspeed(zero_stage=2, offload_optimizer=True), THAW),
    "deepspeed 3 on the host, thawed": (Deepspeed(zero_stage=3, offload_optimizer=True), THAW),
}
NAMES = {
    "lora": LORA,
    "frozen": FREEZE,
    "thawed": THAW,
    "peft": PEFT,
    "dora": DORA,
    "blocks": BLOCKS,
    "new rows": NEW_ROWS,
}


def origin_of(transforms):
    return next(name for name, own in NAMES.items() if own is transforms)


def optimizer(model):
    made, transformed = AdamW(lr=1e-2)(model.hf_named_parameters()), model.transformed
    marks = {"factors": transformed.lr_factors, "undecayed": transformed.first_rows}
    split_by_factor([made], model.hf_named_parameters(), **marks)
    return made


def set_up(strategy, factory, world):
    step = StepConfig(load("32-true"), batch_size=2 // world.size, accumulation=1, grad_clip=0.5)
    return strategy.setup(factory, optimizer, step, world)


def write(engine, folder):
    state = engine.state_dict()
    folder.mkdir(exist_ok=True)
    for kind in KINDS:
        tensors.write(folder / f"{kind}.rank-{engine.world.rank}.safetensors", state[kind])


def train(engine, batch, folder):
    """Some steps; what they show and leave, and the weights before them, lie in ``folder``."""
    full = {name: tensor.cpu().clone() for name, tensor in engine.full_weights()}
    shown = {"trained": engine.num_trained, "parameters": engine.num_parameters, "losses": [], "norms": []}
    world = engine.world
    rows = slice(world.rank * 2 // world.size, (world.rank + 1) * 2 // world.size)
    mine = Batch(batch.input_ids[rows], batch.labels[rows], None, 16 * (rows.stop - rows.start))
    engine.model.train()
    for step in range(STEPS):
        engine.set_progress(step / STEPS)
        engine.set_lr(lambda step: 1.0, step)
        done = engine.train_step(mine)
        shown["losses"].append(float(done.loss))
        shown["norms"].append(float(done.grad_norm))
    write(engine, folder)
    if world.is_main:
        torch.save({"full": full, "shown": shown}, folder / "shown.pt")


def on_rank(world, factory, batch, folder, names):
    recomputed_products.SMALLEST = 1  # in this process, which only this test uses
    for row in names:
        strategy, transforms = (ROWS | SLOW)[row]
        engine = set_up(strategy, replace(factory, transforms=transforms), world)
        train(engine, batch, folder / row)
        origin = folder / origin_of(transforms)
        saved = {kind: TensorFiles(sorted(origin.glob(f"{kind}*"))) for kind in KINDS}
        engine.load_state_dict({**saved, "scaler": {}})
        write(engine, folder / f"{row}, loaded")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {"": tmp_path_factory.mktemp("rows"), "slow": tmp_path_factory.mktemp("slow")}


@pytest.fixture
def trained(folders, factory, batch):
    """``trained(row)``: its folder and that of a single process. All rows of a kind are trained in one start of two processes."""

    def of(row):
        rows, folder = (SLOW, folders["slow"]) if row in SLOW else (ROWS, folders[""])
        for transforms in [own for own in NAMES.values() if any(own is t for _, t in rows.values())]:
            if not (folder / origin_of(transforms)).exists():
                alone = set_up(Single(), replace(factory("llama-tied"), transforms=transforms), DistributedContext())
                train(alone, batch, folder / origin_of(transforms))
        if not (folder / row).exists():
            together(on_rank, factory("llama-tied"), batch, folder, list(rows), folder=folder)
        return folder / row, folder / origin_of(rows[row][1])

    return of


def read(folder):
    return {kind: TensorFiles(sorted(folder.glob(f"{kind}*"))) for kind in KINDS}


@pytest.mark.parametrize("row", [*ROWS, *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW)])
def test_every_strategy_trains_the_same_transformed_model(row, trained):
    transforms = (ROWS | SLOW)[row][1]
    folder, origin = trained(row)
    ours, theirs = (torch.load(f / "shown.pt") for f in (folder, origin))
    assert ours["full"].keys() == theirs["full"].keys()
    assert all(torch.equal(ours["full"][name], theirs["full"][name]) for name in theirs["full"]), "at step 0"
    assert 0 < theirs["shown"]["trained"] < theirs["shown"]["parameters"] + (transforms is THAW)
    for key, expected in theirs["shown"].items():
        assert ours["shown"][key] == pytest.approx(expected, rel=1e-5), key
    found, expected = read(folder), read(origin)
    for kind in KINDS:
        assert found[kind].keys() == expected[kind].keys()
        for name in sorted(expected[kind].keys()):
            torch.testing.assert_close(found[kind].read(name), expected[kind].read(name), rtol=1e-3, atol=1e-5)
    steps = {n: int(expected["optimizer"].read(n)) for n in sorted(expected["optimizer"].keys()) if n.endswith("/step")}
    assert set(steps.values()) == ({1, 2} if transforms is THAW else {2})
    trained_names = {name.rpartition("/")[0] for name in sorted(expected["optimizer"].keys())}
    for name in sorted(expected["model"].keys()):
        same = torch.equal(found["model"].read(name), theirs["full"][name])
        assert same == (name not in trained_names), name
    if transforms is NEW_ROWS:
        (name,) = trained_names
        after, before = found["model"].read(name), theirs["full"][name]
        assert torch.equal(after[:300], before[:300])
        assert not torch.equal(after[300:], before[300:])
    loaded = read(folder.with_name(f"{row}, loaded"))
    for kind in KINDS:
        assert loaded[kind].keys() == expected[kind].keys()
        assert all(torch.equal(loaded[kind].read(n), expected[kind].read(n)) for n in sorted(expected[kind].keys()))
