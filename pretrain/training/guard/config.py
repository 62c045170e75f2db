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

    A spike is a loss more than ``spike_zscore`` robust standard deviations above the median of the last ``window`` good steps.
    Machines of different kinds may round differently, and their ranks may then differ without a fault (``replicas``).

    Attributes:
        nonfinite: Action for a loss or gradient that is NaN or infinite.
        spike: Action for a loss far above those of the previous steps; ignored by default because healthy runs can have
            spikes.
        spike_zscore: Threshold of a spike, in robust standard deviations of the window.
        window: Number of good steps whose losses form the window; no spike is detected before it is full.
        max_skips_in_a_row: Maximum number of consecutive skipped steps; the run stops at the next one.
        max_rollbacks: Maximum number of rollbacks in the whole run; the run stops at the next one.
        replicas: stop: before every save, ranks with the same weights compare them, and the run exits if they differ ·
            ignore.
    """

    nonfinite: Action = "skip"
    spike: Action = "ignore"
    spike_zscore: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    window: Annotated[int, Field(ge=8)] = 64
    max_skips_in_a_row: PositiveInt = 10
    max_rollbacks: NonNegativeInt = 3
    replicas: Literal["stop", "ignore"] = "stop"
