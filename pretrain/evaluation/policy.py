"""What is scored, and on how much text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import PositiveInt


@dataclass(frozen=True)
class Policy:
    """``domains``: sources of role ``base`` by name of the YAML key; ``max_tokens``: of each domain (``None``: all)."""

    batch_size: PositiveInt
    max_tokens: PositiveInt | None = None
    domains: dict[str, Any] = field(default_factory=dict)
