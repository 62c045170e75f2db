"""The config group ``launch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class LaunchConfig:
    """How the processes of a run are started and supervised.

    Attributes:
        max_restarts: How often all workers are restarted after one of them has died.
        timeout: Seconds without progress after which a stalled run ends itself, and for which nodes wait for each other.
        slow_timeout: The same for operations that may be slow, in seconds; a value below ``timeout`` counts as ``timeout``.
        nodes: Number of machines that run this same command.
        endpoint: ``host:port`` of one of the machines, where the agents of all nodes meet.
    """

    max_restarts: NonNegativeInt = 0
    timeout: PositiveFloat = 1800
    slow_timeout: PositiveFloat = 7200
    nodes: PositiveInt = 1
    endpoint: Annotated[str, Field(pattern=r"^[^:/\s]+:\d+$")] | None = None

    @property
    def patience(self) -> float:
        """Return ``slow_timeout``, but at least ``timeout``, in seconds."""
        return max(self.timeout, self.slow_timeout)
