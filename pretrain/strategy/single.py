"""One process on one device: the reference that every other strategy must equal numerically."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.strategy.base import StepConfig, Strategy

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.engine import Engine


@dataclass(frozen=True)
class Single(Strategy):
    """The full model on the first device. It has no options."""

    needs_group = False

    def workers(self, devices: int) -> int:
        return 1

    def setup(
        self,
        model: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        step: StepConfig,
        world: DistributedContext,
    ) -> Engine:
        from pretrain.strategy.engine import Engine

        built = model.build(world.device)
        return Engine(built, optimizer(built), precision=step.precision, grad_clip=step.grad_clip, world=world)
