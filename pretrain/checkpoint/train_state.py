"""The progress of a run. It belongs to the trainer and is saved with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

DERIVED = {"losses": dict[str, float]}  # keys in checkpoints of earlier versions that follow from others → types
RENAMED = {"owes_evaluation": "pending_evaluation"}  # keys in checkpoints of earlier versions → present keys


@dataclass(slots=True)
class TrainState:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        samples: sequences consumed by all ranks.
        tokens: target tokens of all ranks.
        baseline: by domain, the loss of the base model before training (nats per token), against which forgetting is
            measured.
        measured_on: by domain, the text on which the baseline was measured (see `pretrain.evaluation.baseline`).
        evaluated_at: the step of the last evaluation (-1: none yet).
        scores: all results of the last evaluation, one entry per domain.
        best_loss: the lowest loss so far by which ``stop_when.patience`` decides (``None``: it does not).
        evaluations_since_best: evaluations since then.
        seconds: what the run has taken so far, in all starts; 0 without ``stop_when.hours``.
        pending_evaluation: whether a stop signal interrupted the evaluation of this step.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    baseline: dict[str, float] = field(default_factory=dict)
    measured_on: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluated_at: int = -1
    scores: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0
    pending_evaluation: bool = False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in state.keys() - DERIVED.keys():
            setattr(self, key, state[key])
