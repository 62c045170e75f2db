"""A process that stands for one rank of several: its collectives return at once, and exchange nothing."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.distributed.context import DistributedContext
from pretrain.distributed.topology import Topology
from pretrain.strategy.base import StepConfig
from tests.strategy.test_precision import load


@contextmanager
def as_rank(rank, size):
    """The world of a process among ``size``, of whom nobody else is there. torch remembers by the shape of a mesh what
    depends on the rank: a process can only ever be the same one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield DistributedContext(rank, Topology(workers_per_node=size))
    finally:
        dist.destroy_process_group()


def set_up(strategy, factory, world, precision="32-true", optimizer=None):
    """The engine of ``strategy``, with AdamW or what ``optimizer`` makes of named parameters."""
    make = optimizer or (lambda named: torch.optim.AdamW([p for _, p in named]))
    step = StepConfig(load(precision), batch_size=2, accumulation=3)
    return strategy.setup(factory, lambda m: make(m.hf_named_parameters()), step, world)
