"""The config group ``guard``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

Action = Literal["ignore", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class GuardConfig:
    """What is done about a bad step. Only the action ``ignore`` lets such a step change the weights. ``skip`` continues with
    the next batch, ``rollback`` resumes from the last checkpoint and skips the batch when it is reached again, ``stop``
    ends the run.

    Attributes:
        nonfinite: action for a step whose loss or gradient norm is not finite.
        spike: action for a step whose loss lies more than ``spike_zscore`` robust standard deviations above the median
            of the last ``window`` good steps.
        spike_zscore: see ``spike``.
        window: see ``spike``.
        max_skips_in_a_row: the run ends when more steps than this are skipped in a row.
        max_rollbacks: the run ends when more batches than this have caused a rollback.
        replicas: with ``stop``, ranks that hold the same weights and moments compare them before every save, and the run
            ends if they differ; with ``ignore`` they are not compared (machines of different kinds may round differently).
    """

    nonfinite: Action = "skip"
    spike: Action = "ignore"
    spike_zscore: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    window: Annotated[int, Field(ge=8)] = 64
    max_skips_in_a_row: PositiveInt = 10
    max_rollbacks: NonNegativeInt = 3
    replicas: Literal["stop", "ignore"] = "stop"
