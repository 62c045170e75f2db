"""The base class of strategies. A strategy is a stateless value from YAML that builds an `Engine` from a model."""

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
    """The processes, devices and batch sizes that a strategy has to support.

    Attributes:
        device_type: "cuda" or "cpu".
        workers: number of processes on all machines.
        nodes: number of machines.
        devices_per_worker: number of devices of each process.
        precision: dtypes of weights and computation.
        batch_size: sequences per device and micro-batch.
        accumulation: micro-batches per step.
        grad_clip: maximal gradient norm (``None``: gradients are not clipped).
    """

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
        """The number of devices of all processes."""
        return self.workers * self.devices_per_worker


class Strategy(ABC):
    """Builds the engine of a run. To add a strategy, write a file in this folder with a frozen dataclass, and a YAML of the
    same name under ``conf/strategy``."""

    needs_group: bool = True  # whether even a single process needs a process group
    independent_forward: bool = True  # whether one rank can run a forward and a backward without the others

    @property
    def name(self) -> str:
        """The name by which it is selected: ``strategy=<name>``."""
        return type(self).__name__.lower()

    def workers(self, devices: int) -> int:
        """Return the number of processes on a machine with ``devices`` devices."""
        return devices

    def devices_per_worker(self, devices: int) -> int:
        """Return how many of a machine's ``devices`` one process uses. Each device computes ``batch_size`` sequences."""
        return 1

    def check(self, setting: Setting) -> None:
        """Raise ``UserError`` for options that can't work with ``setting``. This does not import torch."""
        return

    def memory_saving_overrides(self, setting: Setting) -> list[str]:
        """Return overrides with which a device needs less memory, the most effective first."""
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
        """Build model and optimizer on this rank. Both are passed as factories, so that the strategy decides when and on
        which device they are built."""
