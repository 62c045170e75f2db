"""The config group ``stop_when``: when a run ends before its last step.

Whether it ends follows from its progress alone, so that all ranks, and a resumed run, come to the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveInt

from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.telemetry.history import mean

if TYPE_CHECKING:
    from pretrain.checkpoint.train_state import TrainState

Limit = Annotated[float, Field(allow_inf_nan=False)]
PositiveLimit = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class StopWhen:
    """When a run ends before its last step. It then evaluates, saves and exports as at its last step.

    Attributes:
        patience: Number of evaluations in a row without a new lowest loss after which the run ends; null: it does not.
        domain: Domain whose loss patience compares; null: the mean of the new domains.
        min_improvement: Nats per token by which a loss must be lower to be a new lowest one.
        forgetting: Limit of the mean change of the loss on the base domains since step 0, in nats per token; null: none.
        tokens: Budget of target tokens; null: none.
        hours: Budget of hours of all starts of the run together; null: none.
    """

    patience: PositiveInt | None = None
    domain: str | None = None
    min_improvement: NonNegativeFloat = 0.0
    forgetting: Limit | None = None
    tokens: PositiveInt | None = None
    hours: PositiveLimit | None = None

    def check(self, domains: Mapping[str, str]) -> None:
        """Raise ``UserError`` for a rule that no evaluation can decide. ``domains`` maps names to roles."""
        if self.domain is not None and self.patience is None:
            raise UserError(f"stop_when.domain={self.domain}: has no effect without stop_when.patience")
        if self.domain not in (None, *domains):
            raise UserError(
                f"stop_when.domain={self.domain}: no such domain is evaluated{did_you_mean(self.domain or '', domains)}"
            )
        if self.patience is not None and self.domain is None and "new" not in domains.values():
            raise UserError(
                f"stop_when.patience={self.patience}: the new domain is not evaluated; name another with stop_when.domain"
            )
        if self.forgetting is not None and "base" not in domains.values():
            raise UserError(f"stop_when.forgetting={self.forgetting}: no base domain is evaluated")

    def note_evaluation(self, state: TrainState) -> None:
        """Count an evaluation whose scores are in ``state``: whether it has a new lowest loss."""
        if self.patience is None:
            return
        loss = self._loss(state.scores)
        if loss is None:
            return
        best = state.best_loss
        if best is None or loss < best - self.min_improvement:
            state.best_loss, state.evaluations_since_best = loss, 0
        else:
            state.evaluations_since_best += 1

    def note_seconds(self, state: TrainState, seconds: float, *, over: bool) -> None:
        """Note the ``seconds`` that the run has taken. Only if the ranks have agreed that they are ``over`` the budget they
        come to it, because their clocks differ."""
        if self.hours is not None:
            budget = self.hours * 3600
            state.seconds = max(seconds, budget) if over else min(seconds, math.nextafter(budget, 0))

    def is_over(self, seconds: float) -> bool:
        """Return whether ``seconds``, by the clock of this rank, are over the budget."""
        return self.hours is not None and seconds >= self.hours * 3600

    def reason(self, state: TrainState) -> str | None:
        """Return why a run that has come as far as ``state`` ends; ``None`` if it does not."""
        if self.tokens is not None and state.tokens >= self.tokens:
            return f"tokens={self.tokens:,} are trained"
        if self.hours is not None and state.seconds >= self.hours * 3600:
            return f"hours={self.hours:g} have passed"
        if state.pending_evaluation or not state.step:
            return None
        if self.patience is not None and state.evaluations_since_best >= self.patience:
            of_what, number = self.domain or "the new domains", state.evaluations_since_best
            return (
                f"the loss of {of_what} has had no new low in {number} evaluations (lowest: {state.best_loss or 0:.4f})"
            )
        if self.forgetting is not None:
            found = mean(score.get("delta_loss") for score in state.scores if score["role"] == "base")
            if found is not None and found > self.forgetting:
                return f"forgetting is {found:+.4f}, above {self.forgetting:g} nats per token"
        return None

    def _loss(self, scores: list[dict[str, Any]]) -> float | None:
        if self.domain is not None:
            return mean(score["loss"] for score in scores if score["domain"] == self.domain)
        return mean(score["loss"] for score in scores if score["role"] == "new")
