"""The config group ``sweep``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

RUN_METRICS = ("new_loss", "new_delta", "forgetting", "train_loss", "tokens_per_second")
DOMAIN_METRICS = ("loss", "perplexity", "bits_per_byte", "delta_loss", "kl_to_base")
TASK_METRIC = "metric/"  # before the key of a metric of an evaluation task: <name> or <domain>/<name>
METRIC = rf"^({'|'.join(RUN_METRICS)}|{TASK_METRIC}[^\x00-\x1f]+|.+\.({'|'.join(DOMAIN_METRICS)}))$"


@dataclass(frozen=True)
class SweepConfig:
    """The objective of a sweep.

    Attributes:
        metric: What jobs are ranked by: new_loss · new_delta · forgetting · train_loss · tokens_per_second · <domain>.loss,
            .perplexity, .bits_per_byte, .delta_loss, .kl_to_base · metric/<name>, metric/<domain>/<name>.
        direction: Whether a smaller or a larger value is better: minimize · maximize.
    """

    metric: Annotated[str, Field(pattern=METRIC)]
    direction: Literal["minimize", "maximize"]
