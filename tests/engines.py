"""Engines of a tiny model, of one process."""

import torch

from pretrain.data.batch import Batch
from pretrain.distributed.context import DistributedContext
from pretrain.models.language_model import LanguageModel
from pretrain.optim.adamw import AdamW
from pretrain.strategy.engine import Engine
from pretrain.strategy.precision import Precision
from tests.models.tiny import tiny

CPU = torch.device("cpu")
ALONE = DistributedContext()
FULL = Precision("32-true", "float32", "float32")
HALF = Precision("16-mixed", "float32", "float16", allow_cpu=True)
IDS = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))
BATCH = Batch(IDS[:, :-1], IDS[:, 1:], None, 32)


def engine_of(name="llama", precision=FULL, world=ALONE, **more) -> Engine:
    model = LanguageModel(tiny(name))
    return Engine(model, AdamW(lr=1e-2)(model.hf_named_parameters()), precision=precision, world=world, **more)


def trained(engine, steps=2) -> Engine:
    for _ in range(steps):
        engine.backward(BATCH, tokens=32, last=True)
        engine.step(1.0)
    return engine


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
