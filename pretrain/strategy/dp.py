"""``torch.nn.DataParallel``: one process that copies the model to every visible GPU at each step.

It is the simplest and slowest way to use several GPUs; ``ddp`` computes the same numbers faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.strategy.base import StepConfig, Strategy

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.topology import Topology
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.engine import Engine


@dataclass(frozen=True)
class Dp(Strategy):
    """torch's DataParallel. It has no options. Without GPUs it is one process on the CPU, and a notice reports that."""

    needs_group = False

    def workers(self, devices: int) -> int:
        return 1

    def devices_per_worker(self, devices: int) -> int:
        return devices

    def check(self, step: StepConfig, topology: Topology) -> None:
        if topology.device_type == "cpu":
            notice("strategy=dp: no GPU is visible, so this is one process on the CPU; ddp and fsdp use several")

    def memory_saving_overrides(self, step: StepConfig, topology: Topology) -> list[str]:
        return ["strategy=fsdp"] if topology.devices_per_worker > 1 else []

    def setup(
        self,
        model: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        step: StepConfig,
        world: DistributedContext,
    ) -> Engine:
        import torch

        from pretrain.strategy.engine import Engine

        built = model.build(world.device)
        if built.is_compiled and world.device.type == "cuda":
            raise UserError("strategy=dp with model.compile=true: its replicas are created again at each step; use ddp")
        devices = list(range(world.topology.devices_per_worker))
        copies = torch.nn.DataParallel(built, device_ids=devices) if world.device.type == "cuda" else built
        return Engine(
            built, optimizer(built), precision=step.precision, grad_clip=step.grad_clip, world=world, step_module=copies
        )
