"""Engines with optimizers of any class: steps that any rank repeats, and what training has made, to the last bit."""

import json

import pytest
import torch

from pretrain.checkpoint.rng import rng_state
from pretrain.checkpoint.store import CheckpointStore, load
from pretrain.data.batch import Batch
from pretrain.distributed.sharding import local
from pretrain.optim.adafactor import Adafactor
from pretrain.optim.adamw import AdamW
from pretrain.optim.muon import Muon
from pretrain.runtime.errors import UserError
from pretrain.strategy.ddp import Ddp
from pretrain.strategy.fsdp import Fsdp
from pretrain.strategy.single import Single
from pretrain.training.guard.replicas import check_replicas
from tests import optimizers
from tests.checkpoint.test_store import state as template
from tests.strategy.ranks import set_up

STRATEGIES = {
    "single": Single(),
    "ddp": Ddp(),
    "FULL_SHARD": Fsdp(),
    "SHARD_GRAD_OP": Fsdp(sharding_strategy="SHARD_GRAD_OP"),
    "NO_SHARD": Fsdp(sharding_strategy="NO_SHARD"),
}
MADE = {
    f.__name__: f
    for f in (
        *(optimizers.adagrad, optimizers.row_wise, optimizers.factored, optimizers.factored_plain),
        *(optimizers.of_the_shard, optimizers.scalars, optimizers.muon_and_adamw, optimizers.groups),
    )
}
MADE["adafactor"] = optimizers.adafactor
OURS = {
    "our_muon": Muon(lr=1e-2, adamw_lr=1e-3),
    "our_adafactor": Adafactor(lr=1e-2),
    "bf16_moments": AdamW(lr=1e-2, beta2=0.999, moments_dtype="bfloat16"),
    "int8_moments": AdamW(lr=1e-2, beta2=0.999, moments_dtype="int8"),
}
MADE |= OURS
SHARDED = "FULL_SHARD"
CELLS = [
    *((name, "ddp") for name in ("adafactor", "scalars", "muon_and_adamw")),
    *(
        (name, SHARDED)
        for name in ("row_wise", "factored_plain", "of_the_shard", "scalars", "muon_and_adamw", "groups")
    ),
    ("of_the_shard", "NO_SHARD"),
    *((name, SHARDED) for name in ("our_muon", "int8_moments")),
]
EVERY = [
    *((name, "ddp") for name in MADE),
    *((name, SHARDED) for name in MADE if name != "adafactor"),  # torch 2.13's Adafactor has no step for DTensors
    *((name, strategy) for name in ("of_the_shard", "row_wise") for strategy in ("SHARD_GRAD_OP", "NO_SHARD")),
]
MORE = [cell for cell in EVERY if cell not in CELLS]
PER_RANK = {"of_the_shard"}


def cosine(step: int) -> float:
    return 1 - step / 16


def step(engine, number: int) -> None:
    generator = torch.Generator().manual_seed(100 * number + engine.world.rank)
    ids = torch.randint(300, (2, 17), generator=generator)
    batch = Batch(ids[:, :-1], ids[:, 1:], None, 32)
    engine.set_lr(cosine, number)
    engine.backward(batch, tokens=32 * engine.world.size, last=True)
    engine.step(1.0)


def trained(engine, first: int, last: int):
    for number in range(first, last):
        step(engine, number)
    return engine


def bits(engine) -> dict:
    """All that training has made on this rank."""
    state = engine.state_dict()
    found = {f"{kind}:{n}": s.tensor.clone() for kind in ("model", "optimizer") for n, s in state[kind].items()}
    own = {f"own:{n}": local(p).detach().clone() for n, p in engine.model.hf_named_parameters()}
    return found | own | {"values": json.loads(json.dumps(state.get("optimizer_values")))}


def differences(ours: dict, theirs: dict) -> list[str]:
    found = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        found += [] if same else [name]
    return found


def save(engine, folder) -> None:
    if engine.world.size > 1:
        check_replicas(engine, 4)
    rng = engine.world.all_gather_object(rng_state)
    store = CheckpointStore(folder)
    store.save(4, template(4) | {"engine": engine.state_dict(), "rng": rng}, world=engine.world)


def engine_of(strategy: str, name: str, factory, world):
    return set_up(STRATEGIES[strategy], factory, world, optimizer=MADE[name])


def loaded(engine, folder):
    engine.load_state_dict(load(folder / "step-00000004")["engine"])
    return engine


def continues(strategy, name, factory, world, folder) -> list[str]:
    """The differences between a run that was interrupted and one that was not."""
    engine = trained(engine_of(strategy, name, factory, world), 0, 4)
    save(engine, folder)
    expected = bits(trained(engine, 4, 8))
    again = loaded(engine_of(strategy, name, factory, world), folder)
    first = bits(trained(again, 4, 8))
    if world.size > 1:
        return differences(first, expected)
    rolled_back = bits(trained(loaded(again, folder), 4, 8))
    return differences(first, expected) + differences(rolled_back, expected)


def refusal(work) -> str:
    with pytest.raises(UserError) as refused:
        work()
    return str(refused.value)
