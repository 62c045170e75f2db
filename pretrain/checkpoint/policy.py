"""When checkpoints are made and which of them stay."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import PositiveInt


@dataclass(frozen=True)
class Policy:
    """``keep_last``: the newest whole checkpoints to keep; ``None``: all. ``with_evaluation``: save
    whenever the run evaluates, instead of every ``save_every`` steps."""

    keep_last: PositiveInt | None = 2
    with_evaluation: bool = False
