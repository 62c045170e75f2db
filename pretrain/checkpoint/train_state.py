"""How far a run has come. The trainer owns it; it is saved with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

RENAMED = {"owes_evaluation": "pending_evaluation"}  # keys of checkpoints of earlier versions


@dataclass(slots=True)
class TrainState:
    """``step`` optimizer steps done · ``samples`` sequences consumed by all ranks · ``tokens`` target tokens, all ranks.

    ``baseline`` holds each domain's loss of the untouched model (nats per token), against which forgetting is measured,
    and ``measured_on`` on what it was measured (see `pretrain.evaluation.baseline`); ``losses`` those of the last
    evaluation, at step ``evaluated_at``, and ``scores`` all that it found, by domain.
    ``pending_evaluation``: a stop signal cut short the evaluation of this step.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    baseline: dict[str, float] = field(default_factory=dict)
    measured_on: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    scores: list[dict[str, Any]] = field(default_factory=list)
    pending_evaluation: bool = False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
