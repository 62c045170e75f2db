"""The configuration of sweeps. conf/sweep/default.yaml documents the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

OF_A_RUN = ("new_loss", "new_delta", "forgetting", "train_loss", "tokens_per_second")
OF_A_DOMAIN = ("loss", "perplexity", "bits_per_byte", "delta_loss")
METRIC = rf"^({'|'.join(OF_A_RUN)}|.+\.({'|'.join(OF_A_DOMAIN)}))$"


@dataclass(frozen=True)
class SweepConfig:
    """The objective of a sweep: the ``metric`` by which jobs are ranked, and its ``direction``."""

    metric: Annotated[str, Field(pattern=METRIC)]
    direction: Literal["minimize", "maximize"]
