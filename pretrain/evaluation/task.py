"""The base class of evaluation tasks, and the metrics that they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from pretrain.telemetry.metric import Metric as Metric

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine


class EvaluationInterrupted(Exception):
    """A stop signal has arrived during a measurement, on every rank at the same place."""


class EvaluationTask(ABC):
    """A measurement of the model, which is made at every evaluation of a run and by ``task=evaluation``.

    To add one, write a class with its settings and name it in a config: ``evaluation.tasks.<name>: {_target_: ...}``.

    Attributes:
        at_ends_only: whether a run makes the measurement only before its first and after its last step.
    """

    @property
    def at_ends_only(self) -> bool:
        return False

    @abstractmethod
    def evaluate(self, engine: InferenceEngine) -> list[Metric]:
        """Measure the model. The model is in eval mode and gradients are disabled.

        All ranks call it, because a forward of a sharded model is a collective; the metrics of rank 0 count.
        """
