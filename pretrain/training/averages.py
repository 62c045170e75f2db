"""The averages of the weights that hooks keep: scored beside the weights at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.evaluation.task import EvaluationTask, Metric
from pretrain.strategy.replaced import replaced_weights

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.evaluation.perplexity import Evaluator
    from pretrain.strategy.engine import InferenceEngine

NATS = "nats per token"


@dataclass(frozen=True)
class ScoreAverages(EvaluationTask):
    """Score each average on all domains. Its losses are metrics ``<average>_loss`` of their domain.

    Attributes:
        averages: Returns the averages, by name.
        evaluator: Scores the domains.
    """

    averages: Callable[[], Mapping[str, Mapping[str, Tensor]]]
    evaluator: Evaluator

    def evaluate(self, engine: InferenceEngine) -> list[Metric]:
        metrics = []
        for name, weights in self.averages().items():
            with replaced_weights(engine, weights):
                scores = self.evaluator.run(engine) or []
            metrics += [Metric(f"{name}_loss", score.loss, NATS, "lower", score.domain) for score in scores]
        return metrics
