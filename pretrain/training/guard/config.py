"""The keys of ``guard``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

Action = Literal["ignore", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class GuardConfig:
    """What is done about a step whose loss or gradient norm is no finite number (``nonfinite``), or whose loss lies more
    than ``spike_zscore`` robust standard deviations above the median of the last ``window`` good steps (``spike``).

    No action but ``ignore`` lets the step change the weights. ``skip``: go on with the next batch. ``rollback``: go back
    to the last checkpoint and pass over the batch when it comes again. ``stop``: end the run.

    ``replicas``: ``stop``: before every save, ranks that hold the same weights and moments compare them, and the run ends
    where they differ; ``ignore``: they don't (machines of different kinds may round differently).
    """

    nonfinite: Action = "skip"
    spike: Action = "ignore"
    spike_zscore: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    window: Annotated[int, Field(ge=8)] = 64
    max_skips_in_a_row: PositiveInt = 10
    max_rollbacks: NonNegativeInt = 3
    replicas: Literal["stop", "ignore"] = "stop"
