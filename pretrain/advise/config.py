"""The settings of ``task=advise``. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from pretrain.runtime.errors import UserError

Step = Literal["look", "lr", "share", "length", "batch", "means"]
STEPS: tuple[Step, ...] = ("look", "lr", "share", "length", "batch", "means")


@dataclass(frozen=True)
class AdviseConfig:
    """What ``task=advise`` may spend, and what it looks for.

    Attributes:
        budget: Largest compute of all probes and scores together, as a share of the planned run's.
        max_forgetting: Largest increase of the loss on the base domains that is accepted, in nats per token; null: no limit.
        steps: What is done: look (model and text) · lr (learning rate) · share (replay) · length (how long) · batch (with
            several devices) · means (LoRA, merge, KL, where too much is forgotten).
        rates: Number of learning rates that are tried.
        checks: Number of short runs that check the predicted share.
        probe_steps: Optimizer steps of a probe; null: as many as the budget allows, at most the planned ones.
        prior_share: Replay share that is assumed before anything is measured; null: replay.share, or 0.1 where that is 0.
        penalty: Weight of the divergence KL(mixture ‖ prior_share) in the choice of the share, in nats per token.
        predicted: What task=advise has predicted for this run, written into its experiment and read by the report: domain →
            [role, steps, change of the loss, low, high].
        limit: Gain in nats per token for each further tenth of the run below which a shorter run is advised.
    """

    budget: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 0.2
    max_forgetting: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] | None = None
    steps: list[Step] = field(default_factory=lambda: list(STEPS))
    rates: Annotated[int, Field(ge=3, le=5)] = 4
    checks: Annotated[int, Field(ge=0, le=2)] = 1
    probe_steps: Annotated[int, Field(ge=8)] | None = None
    prior_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    penalty: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 0.05
    predicted: dict[str, list[str | int | float]] = field(default_factory=dict)
    limit: Annotated[PositiveFloat, Field(allow_inf_nan=False)] = 0.01

    def check(self) -> None:
        """Raise ``UserError`` where nothing is left to do."""
        if not {"look", "lr", "share"} & set(self.steps):
            raise UserError(
                f"advise.steps=[{','.join(self.steps)}]: length, batch and means read the runs of the other steps; add lr or "
                "share"
            )
