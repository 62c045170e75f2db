"""Goodput: the share of a run's wall time, since its first start, that was spent on training steps that were kept.

The remaining time was spent on startup, evaluation, saving, the time between two starts, and steps that a crash or a rollback
discarded and that are trained again. Goodput is computed from files that a run writes anyway: run.json has the time of the
first start, the history of the records has the steps that were kept. For the term see
https://cloud.google.com/blog/products/ai-machine-learning/goodput-metric-as-measure-of-ml-productivity
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.history import History
from pretrain.telemetry.numbers import is_number
from pretrain.telemetry.run_file import earlier_facts


class Goodput:
    """The goodput of one run."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._earlier_seconds: float | None = 0.0  # wall time from the first start to this one; unknown without records
        self._started_at = time.monotonic()

    def start(self, event: RunStarted, earlier: History) -> None:
        """Read when the run was first started. Call this before run.json is rewritten. ``earlier`` has the records of the
        earlier starts."""
        known = earlier_facts(self._run, event).get("started_at")
        if known is None and is_number(
            found := earlier.first.get("time")
        ):  # run.json of earlier versions has no start time
            known = found
        now = time.time()
        self._earlier_seconds = None if event.step and not earlier.first else max(0.0, now - (known or now))
        self._started_at = time.monotonic()

    def share(self, trained_seconds: float) -> float | None:
        """Return the goodput, 0–1, of a run with that many seconds of training steps that were kept. It is ``None`` if an
        earlier start left no records."""
        if self._earlier_seconds is None or math.isnan(trained_seconds):
            return None
        wall = self._earlier_seconds + time.monotonic() - self._started_at
        return min(1.0, trained_seconds / wall) if wall > 0 else None
