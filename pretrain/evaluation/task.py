"""The base class of evaluation tasks, and the metrics that they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine


@dataclass(frozen=True)
class Metric:
    """One number that an evaluation has measured.

    Attributes:
        name: Name of the metric, such as ``accuracy``.
        value: The measured value.
        unit: Unit of the value; empty for a number without one.
        better: Whether a lower or a higher value is better.
        domain: The domain of the text on which it was measured; ``None`` for no domain of the run.
        stderr: Standard error of the value; ``None`` where it is unknown.
    """

    name: str
    value: float
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    domain: str | None = None
    stderr: float | None = None


class EvaluationTask(ABC):
    """A measurement of the model, which is made at every evaluation of a run and by ``task=evaluation``.

    To add one, write a class with its settings and name it in a config: ``evaluation.tasks.<name>: {_target_: ...}``.
    """

    @abstractmethod
    def evaluate(self, engine: InferenceEngine) -> list[Metric]:
        """Measure the model. The model is in eval mode and gradients are disabled.

        All ranks call it, because a forward of a sharded model is a collective; the metrics of rank 0 count.
        """
