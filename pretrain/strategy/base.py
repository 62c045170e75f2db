"""What a strategy is: a value from YAML, without state, that turns a model into an Engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.engine import Engine
    from pretrain.strategy.precision import Precision


@dataclass(frozen=True)
class Setting:
    """What a strategy is asked to work in: ``workers`` processes in all, on ``nodes`` machines, each on
    ``devices_per_worker`` devices of ``device_type`` ("cuda" or "cpu")."""

    device_type: str
    workers: int
    nodes: int
    devices_per_worker: int
    precision: Precision
    batch_size: int
    accumulation: int
    grad_clip: float | None

    @property
    def devices(self) -> int:
        """Of all processes."""
        return self.workers * self.devices_per_worker


class Strategy(ABC):
    """To add one: a file here with a frozen dataclass, and a YAML of the same name under ``conf/strategy``."""

    needs_group: bool = True  # whether even one process wants a process group
    independent_forward: bool = True  # whether a rank can go forward and backward without the others

    @property
    def name(self) -> str:
        """As it is chosen: ``strategy=<name>``."""
        return type(self).__name__.lower()

    def workers(self, devices: int) -> int:
        """How many processes share a machine with ``devices`` devices."""
        return devices

    def devices_per_worker(self, devices: int) -> int:
        """How many of a machine's ``devices`` one process computes on, each with ``batch_size`` sequences."""
        return 1

    def check(self, setting: Setting) -> None:
        """Raises ``UserError`` for options that can't work there. Imports no torch."""
        return

    def memory_saving_overrides(self, setting: Setting) -> list[str]:
        """Overrides with which a device needs less memory there, the best first."""
        return []

    @abstractmethod
    def setup(
        self,
        model: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        *,
        setting: Setting,
        world: DistributedContext,
    ) -> Engine:
        """Build model and optimizer on this rank. Both come as recipes, so that a strategy decides when and where."""
