"""The engine of ``strategy=fsdp``: the policies of `fully_shard` take the place of autocast and of DDP's ``no_sync``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pretrain.engine import Engine


class FsdpEngine(Engine):
    """``exchange_always``: gradients are reduced and freed after every micro-batch, not only after the last."""

    def __init__(self, *args: Any, exchange_always: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._exchange_always = exchange_always

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext()

    def communication(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last or self._exchange_always)
        return nullcontext()

    def infer(self, *inputs: Tensor | None, **more: Tensor) -> Tensor:
        found = super().infer(*inputs, **more)
        free_gathered(self.model)
        return found


def free_gathered(model: nn.Module) -> None:
    """Leave shards only: after a forward without a backward nothing else frees what it has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
