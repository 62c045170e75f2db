"""The base class of strategies. A strategy is a stateless value from YAML that builds an `Engine` from a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.strategy.precision import Precision

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.config.schema import RunConfig
    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.topology import Topology
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.engine import Engine, InferenceEngine


@dataclass(frozen=True)
class StepConfig:
    """The settings of an optimizer step that an engine needs.

    Attributes:
        precision: dtypes of weights and computation.
        batch_size: sequences per device and micro-batch.
        accumulation: micro-batches per step.
        grad_clip: maximal gradient norm (``None``: gradients are not clipped).
    """

    precision: Precision = Precision()
    batch_size: int = 1
    accumulation: int = 1
    grad_clip: float | None = None

    @classmethod
    def of(cls, config: RunConfig) -> StepConfig:
        """Return the settings in the config of a run."""
        accumulation = config.gradient_accumulation_steps
        return cls(config.precision, config.micro_batch_size, accumulation, config.grad_clip)


class Strategy(ABC):
    """Builds the engine of a run. To add a strategy, write a file in this folder with a frozen dataclass, and a YAML of the
    same name under ``conf/strategy``."""

    needs_group: bool = True  # whether even a single process needs a process group
    model_parallel_size: int = (
        1  # consecutive ranks that share one replica of the model and compute on the same batches
    )
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

    def check(self, step: StepConfig, topology: Topology) -> None:
        """Raise ``UserError`` for options that can't work with ``step`` on ``topology``. This does not import torch."""
        return

    def memory_saving_overrides(self, step: StepConfig, topology: Topology) -> list[str]:
        """Return overrides with which a device needs less memory, the most effective first."""
        return []

    def reference(
        self, model: ModelFactory, step: StepConfig, world: DistributedContext, *, offload: bool = False
    ) -> InferenceEngine:
        """Return a second model for forwards alone, such as the base model that an objective compares with. The default has the
        full model on every rank. With ``offload`` its weights are kept on the host; raises ``UserError`` where they can't be."""
        from pretrain.runtime.errors import UserError
        from pretrain.strategy.engine import InferenceEngine

        if offload:
            raise UserError(
                f"objective.base_offload=true with strategy={self.name}: only strategy=fsdp gathers weights from the host; use "
                "objective.base_dtype=bfloat16"
            )
        return InferenceEngine(model.build(world.device), precision=step.precision, world=world)

    @abstractmethod
    def setup(
        self,
        model: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        step: StepConfig,
        world: DistributedContext,
    ) -> Engine:
        """Build model and optimizer on this rank. Both are passed as factories, so that the strategy decides when and on
        which device they are built."""
