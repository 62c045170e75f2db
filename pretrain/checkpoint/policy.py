"""Which checkpoints stay."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import PositiveInt


@dataclass(frozen=True)
class Policy:
    """``keep_last``: the newest whole checkpoints to keep; ``None``: all."""

    keep_last: PositiveInt | None = 2
