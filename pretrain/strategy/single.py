"""One process on one device: the reference every other strategy must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.engine import Engine
    from pretrain.models.language_model import LanguageModel
    from pretrain.precision import Precision
    from pretrain.world import World


@dataclass(frozen=True)
class Single:
    """No options: the model lives whole on the first device."""

    def workers(self, devices: int) -> int:
        return 1

    def setup(
        self,
        model: Callable[[], LanguageModel],
        optimizer: Callable[[LanguageModel], Optimizer],
        *,
        precision: Precision,
        world: World,
    ) -> Engine:
        from pretrain.engine import Engine

        built = model()
        return Engine(built, optimizer(built), precision=precision, world=world)
