"""The engine of ``strategy=fsdp``. The policies of `fully_shard` replace autocast and DDP's ``no_sync``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pretrain.strategy.engine import Engine, InferenceEngine, never
from pretrain.strategy.gradient_norm import norm_of


class FsdpInferenceEngine(InferenceEngine):
    """A sharded model that can be evaluated."""

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext()  # the policy casts the gathered weights

    def forward(self, *inputs: Tensor | None, **more: Any) -> Any:
        found = super().forward(*inputs, **more)
        free_gathered(self.model)
        return found


class FsdpEngine(FsdpInferenceEngine, Engine):
    """With ``exchange_always``, gradients are reduced and freed after every micro-batch, not only after the last one.
    ``unsharded`` are the parameters that are replicated instead of sharded; their gradients are averaged here."""

    def __init__(
        self, *args: Any, exchange_always: bool, unsharded: Sequence[nn.Parameter] = (), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._exchange_always = exchange_always
        self._unsharded = unsharded

    def communication(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last or self._exchange_always)
        return nullcontext()

    def step(self, max_norm: float | None, *, refuse: Callable[[Tensor], Tensor] = never) -> Tensor:
        for parameter in self._unsharded:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.size
        return super().step(max_norm, refuse=refuse)

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        unsharded = {id(p) for p in self._unsharded}
        sharded = norm_of([p for p in parameters if id(p) not in unsharded])
        if not unsharded:
            return sharded
        return torch.hypot(sharded, norm_of([p for p in parameters if id(p) in unsharded]).to(sharded.device))


def free_gathered(model: nn.Module) -> None:
    """Free the gathered parameters and keep the shards. After a forward without a backward nothing else frees them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
