"""Where a step's time goes, measured where the work is done and never waited for.

On a CPU the host's own clock. On a GPU the host only queues work, so its clock would time the queueing: events are put into
the stream before and after a part instead, and read at a log step, when they have long been passed. Around something that
keeps the host (the loader, other ranks) two events are apart by as long as the device had nothing left to do meanwhile:
what shows is what training really lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["data", "communication", "compute", "optimizer"]
Span = tuple[Part, Any, Any]  # what the clock read before and after


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The parts of one step as they were measured: host seconds, or events of the device that may still be to come."""

    spans: tuple[Span, ...] = ()
    on_device: bool = False

    def over(self) -> bool:
        """Whether `seconds` would wait for nothing."""
        return not self.on_device or all(after.query() for _, _, after in self.spans[-1:])  # the stream goes in order

    def seconds(self) -> dict[Part, float]:
        """Seconds of each part. Waits for the device, if it has not come so far: for log steps only."""
        found: dict[Part, float] = {"data": 0.0, "communication": 0.0, "compute": 0.0, "optimizer": 0.0}
        for part, before, after in self.spans:
            if self.on_device:
                after.synchronize()
                found[part] += before.elapsed_time(after) / 1000  # it tells milliseconds
            else:
                found[part] += after - before
        return found


@dataclass(slots=True)
class StepTimer:
    """Of one rank. ``on_device``: whether its work is queued on a GPU."""

    on_device: bool = False
    _spans: list[Span] = field(default_factory=list)

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Everything inside belongs to ``part`` of the current step."""
        before = self._now()
        yield
        self._spans.append((part, before, self._now()))

    def take(self) -> StepTimes:
        """What was measured since the last time this was asked."""
        spans, self._spans = tuple(self._spans), []
        return StepTimes(spans, self.on_device)

    def _now(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
