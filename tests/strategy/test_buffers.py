"""What a strategy must not lose on the way from a shape without memory to a model that computes."""

import torch
from torch import nn

from pretrain.distributed.context import DistributedContext
from pretrain.strategy.fsdp import materialise


class Rope(nn.Module):
    def __init__(self, frequencies):
        super().__init__()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.weight = nn.Parameter(torch.empty(3, device="meta"))


def test_a_buffer_that_two_modules_share_keeps_its_values_in_both():
    """torch names it once unless told otherwise, and gives each module fresh memory for it."""
    shared = torch.arange(1.0, 1000.0)
    model = nn.ModuleDict({"first": Rope(shared), "second": Rope(shared)})
    assert len(dict(model.named_buffers())) == 1
    materialise(model, DistributedContext(), offload=False)
    assert not model["second"].weight.is_meta
    for module in model.values():
        assert torch.equal(module.frequencies, shared)
