"""The config group ``launch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class LaunchConfig:
    """How the processes of a run are started and supervised.

    A ``slow_timeout`` below ``timeout`` counts as ``timeout``.

    Attributes:
        max_restarts: Number of automatic restarts from the last checkpoint after a process of the run has died.
        timeout: Seconds without progress after which the run exits; also the limit for nodes to find each other.
        slow_timeout: The same limit for slow operations: resuming, compiling (first step, first batch of an
            evaluation), exporting.
        nodes: Number of machines; run the same command on each of them.
        endpoint: host:port of one of the machines, where the processes rendezvous if nodes > 1.
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
