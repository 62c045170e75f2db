"""Every strategy trains the same transformed model: its weights at the start, each step, what it saves and what it loads."""

from dataclasses import replace

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.distributed import sharding as tensors
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.sharding import TensorFiles
from pretrain.models.transforms.freeze import Freeze as ShippedFreeze
from pretrain.optim.adamw import AdamW
from pretrain.runtime.errors import UserError
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
ROWS = {
    "ddp, thawed": (Ddp(), THAW),
    "fsdp, thawed": (Fsdp(), THAW),
    "deepspeed 0, thawed": (Deepspeed(zero_stage=0), THAW),
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
ORIGINS = {LORA: "lora", FREEZE: "frozen", THAW: "thawed"}


def set_up(strategy, factory, world):
    step = StepConfig(load("32-true"), batch_size=2 // world.size, accumulation=1, grad_clip=0.5)
    return strategy.setup(factory, lambda m: AdamW(lr=1e-2)(m.hf_named_parameters()), step, world)


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
        done = engine.train_step(mine)
        shown["losses"].append(float(done.loss))
        shown["norms"].append(float(done.grad_norm))
    write(engine, folder)
    if world.is_main:
        torch.save({"full": full, "shown": shown}, folder / "shown.pt")


def on_rank(world, factory, batch, folder):
    for row, (strategy, transforms) in ROWS.items():
        engine = set_up(strategy, replace(factory, transforms=transforms), world)
        train(engine, batch, folder / row)
        origin = folder / ORIGINS[transforms]
        saved = {kind: TensorFiles(sorted(origin.glob(f"{kind}*"))) for kind in KINDS}
        engine.load_state_dict({**saved, "scaler": {}})
        write(engine, folder / f"{row}, loaded")
    with pytest.raises(UserError, match=r"thaw_at with strategy\.zero_stage=2: ZeRO updates all parameters"):
        set_up(Deepspeed(zero_stage=2), replace(factory, transforms=THAW), world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def trained(folder, factory, batch):
    """Every row's folder, from one start of two processes, beside those of a single process."""
    if not (folder / "lora").exists():
        for transforms, name in ORIGINS.items():
            alone = set_up(Single(), replace(factory("llama-tied"), transforms=transforms), DistributedContext())
            train(alone, batch, folder / name)
        together(on_rank, factory("llama-tied"), batch, folder, folder=folder)
    return folder


def read(folder):
    return {kind: TensorFiles(sorted(folder.glob(f"{kind}*"))) for kind in KINDS}


@pytest.mark.parametrize("row", ROWS)
def test_every_strategy_trains_the_same_transformed_model(row, trained):
    origin = trained / ORIGINS[ROWS[row][1]]
    ours, theirs = (torch.load(f / "shown.pt") for f in (trained / row, origin))
    assert ours["full"].keys() == theirs["full"].keys()
    assert all(torch.equal(ours["full"][name], theirs["full"][name]) for name in theirs["full"]), "at step 0"
    assert 0 < theirs["shown"]["trained"] < theirs["shown"]["parameters"] + (ROWS[row][1] is THAW)
    for key, expected in theirs["shown"].items():
        assert ours["shown"][key] == pytest.approx(expected, rel=1e-5), key
    found, expected = read(trained / row), read(origin)
    for kind in KINDS:
        assert found[kind].keys() == expected[kind].keys()
        for name in sorted(expected[kind].keys()):
            torch.testing.assert_close(found[kind].read(name), expected[kind].read(name), rtol=1e-3, atol=1e-5)
    steps = {n: int(expected["optimizer"].read(n)) for n in sorted(expected["optimizer"].keys()) if n.endswith("/step")}
    assert set(steps.values()) == ({1, 2} if ROWS[row][1] is THAW else {2})
    trained_names = {name.rpartition("/")[0] for name in sorted(expected["optimizer"].keys())}
    for name in sorted(expected["model"].keys()):
        same = torch.equal(found["model"].read(name), theirs["full"][name])
        assert same == (name not in trained_names), name
    loaded = read(trained / f"{row}, loaded")
    for kind in KINDS:
        assert loaded[kind].keys() == expected[kind].keys()
        assert all(torch.equal(loaded[kind].read(n), expected[kind].read(n)) for n in sorted(expected[kind].keys()))
