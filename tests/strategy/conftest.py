"""A model's blueprint, and a process that stands for one of several: its collectives return at once."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.models.blueprint import Blueprint
from pretrain.models.causal_lm import Pretrained
from pretrain.strategy.base import Setting
from pretrain.world import World
from tests.test_precision import load


@pytest.fixture
def blueprint(exact_model):
    """``blueprint(shape)``: of a tiny model in fp32."""
    return lambda shape: Blueprint(Pretrained(name_or_path=str(exact_model(shape))), torch.float32, 0)


@pytest.fixture
def as_rank():
    """``with as_rank(rank, size) as world``: a process group in which nobody else is."""

    @contextmanager
    def enter(rank, size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            yield World(rank, size, torch.device("cpu"))
        finally:
            dist.destroy_process_group()

    return enter


@pytest.fixture
def setup():
    """``setup(strategy, blueprint, world, precision)``: its engine, with AdamW."""

    def build(strategy, blueprint, world, precision="32-true"):
        sizes = {"workers": world.size, "nodes": 1, "devices_per_worker": 1, "batch_size": 2, "accumulation": 3}
        setting = Setting("cpu", precision=load(precision), grad_clip=None, **sizes)
        return strategy.setup(blueprint, lambda m: torch.optim.AdamW(m.parameters()), setting=setting, world=world)

    return build


@pytest.fixture
def batch():
    from pretrain.batch import Batch

    ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], None, 32)
