"""What is scored, and on how much text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import PositiveInt


@dataclass(frozen=True)
class Policy:
    """``batch_size``: auto is that of the training. ``domains``: sources of role ``base`` by name of the YAML key;
    ``max_tokens``: of each domain (``None``: all); ``per_epoch``: evaluations per pass over the training documents,
    instead of the run's ``evaluate_every``."""

    batch_size: Literal["auto"] | PositiveInt
    max_tokens: PositiveInt | None = None
    per_epoch: PositiveInt | None = None
    domains: dict[str, Any] = field(default_factory=dict)
