"""One process on one device: the reference every other strategy must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.strategy.base import Setting, Strategy

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.engine import Engine
    from pretrain.models.blueprint import Blueprint
    from pretrain.models.language_model import LanguageModel
    from pretrain.world import World


@dataclass(frozen=True)
class Single(Strategy):
    """No options: the model lives whole on the first device."""

    needs_group = False

    def workers(self, devices: int) -> int:
        return 1

    def setup(
        self,
        model: Blueprint,
        optimizer: Callable[[LanguageModel], Optimizer],
        *,
        setting: Setting,
        world: World,
    ) -> Engine:
        from pretrain.engine import Engine

        built = model.build(world.device)
        return Engine(built, optimizer(built), precision=setting.precision, world=world)
