"""Time the parts of a step without synchronising with the device.

On a CPU the host's clock is read. On a GPU the host only queues work, so its clock would time the queueing. Instead, events
are recorded in the stream before and after each part, and read at a log step, when the device has long passed them. Around a
part that blocks the host (the loader, other ranks) the time between two events is the time for which the device was idle,
which is the time that training lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["data", "communication", "compute", "optimizer"]
Span = tuple[Part, Any, Any]  # clock readings (or events) before and after


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The measured parts of one step: host seconds, or device events that the device may not have reached yet."""

    spans: tuple[Span, ...] = ()
    on_device: bool = False

    def over(self) -> bool:
        """Return whether the device has passed all events, so that `seconds` would not block."""
        return not self.on_device or all(after.query() for _, _, after in self.spans[-1:])  # a stream runs in order

    def seconds(self) -> dict[Part, float]:
        """Return the seconds of each part. This synchronises with the device if needed, so call it at log steps only."""
        found: dict[Part, float] = {"data": 0.0, "communication": 0.0, "compute": 0.0, "optimizer": 0.0}
        for part, before, after in self.spans:
            if self.on_device:
                after.synchronize()
                found[part] += before.elapsed_time(after) / 1000  # elapsed_time is in milliseconds
            else:
                found[part] += after - before
        return found


@dataclass(slots=True)
class StepTimer:
    """The timer of one rank. ``on_device`` is whether the rank's work is queued on a GPU."""

    on_device: bool = False
    _spans: list[Span] = field(default_factory=list)

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Time the body of the ``with`` statement as ``part`` of the current step."""
        before = self._now()
        yield
        self._spans.append((part, before, self._now()))

    def take(self) -> StepTimes:
        """Return what was measured since the last call."""
        spans, self._spans = tuple(self._spans), []
        return StepTimes(spans, self.on_device)

    def _now(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
