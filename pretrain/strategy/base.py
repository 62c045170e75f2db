"""What a strategy is: a value from YAML, without state, that turns a model into an Engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.engine import Engine
    from pretrain.models.language_model import LanguageModel
    from pretrain.precision import Precision
    from pretrain.world import World


class Strategy(Protocol):
    """To add one: a file here with a frozen dataclass, and a YAML of the same name under ``conf/strategy``."""

    def workers(self, devices: int) -> int:
        """How many processes share a machine with ``devices`` devices."""
        ...

    def setup(
        self,
        model: Callable[[], LanguageModel],
        optimizer: Callable[[LanguageModel], Optimizer],
        *,
        precision: Precision,
        world: World,
    ) -> Engine:
        """Build model and optimizer on this rank. Both come as factories, so that a strategy decides when and where."""
        ...
