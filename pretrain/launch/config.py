"""The keys of ``launch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class LaunchConfig:
    """``max_restarts``: of the whole group, after one of its processes has died · ``timeout``: seconds after which a run that
    has not moved ends itself, and that nodes wait for each other · ``slow_timeout``: the same for what may be slow, never less
    than ``timeout`` · ``nodes``: machines that run this same command and meet at ``endpoint`` (host:port of one of them)."""

    max_restarts: NonNegativeInt = 0
    timeout: PositiveFloat = 1800
    slow_timeout: PositiveFloat = 7200
    nodes: PositiveInt = 1
    endpoint: Annotated[str, Field(pattern=r"^[^:/\s]+:\d+$")] | None = None

    @property
    def patience(self) -> float:
        """``slow_timeout``, but never less than ``timeout``."""
        return max(self.timeout, self.slow_timeout)
