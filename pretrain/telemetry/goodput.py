"""Goodput: the share of a run's wall time, since its first start, that was spent on training steps that were kept.

The remaining time was spent on startup, evaluation, saving, the time between two starts, and steps that a crash or a rollback
discarded and that are trained again. Goodput is computed from files that a run writes anyway: run.json has the time of the
first start, metrics.jsonl has the steps that were kept. For the term see
https://cloud.google.com/blog/products/ai-machine-learning/goodput-metric-as-measure-of-ml-productivity
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.run_file import earlier_facts
from pretrain.telemetry.sinks.jsonl import records_until


class Goodput:
    """The goodput of one run. It counts complete windows of steps: a window that a rollback cuts in its middle does not
    count at all."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._windows: list[tuple[int, float]] = []  # (last step, seconds)
        self._seconds = 0.0  # the sum over all windows
        self._earlier_seconds: float | None = 0.0  # wall time from the first start to this one
        self._started_at = time.monotonic()

    def start(self, event: RunStarted) -> None:
        """Read the files of earlier starts. Call this before the sinks are opened, because opening them truncates the
        files."""
        records: list[dict[str, Any]] = []
        windows: list[tuple[int, float]] = []
        if event.step:
            with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file must not stop the run
                earlier = records_until(self._run / "metrics.jsonl", event)
                windows, records = trained(earlier), earlier
        self._keep(windows)
        known = earlier_facts(self._run, event).get("started_at")
        if known is None and records:  # run.json of earlier versions has no start time
            found = records[0].get("time")
            known = found if isinstance(found, int | float) else None
        now = time.time()
        self._earlier_seconds = None if event.step and not records else max(0.0, now - (known or now))
        self._started_at = time.monotonic()

    def add(self, step: int, seconds: float) -> None:
        """Add a window of training steps that ends with ``step`` and took ``seconds``."""
        self._windows.append((step, seconds))
        self._seconds += seconds

    def go_back(self, step: int) -> None:
        """Drop all windows that end after ``step``, to which the run was rolled back."""
        self._keep([window for window in self._windows if window[0] <= step])

    def _keep(self, windows: list[tuple[int, float]]) -> None:
        self._windows = windows
        self._seconds = sum(seconds for _, seconds in windows)

    def share(self) -> float | None:
        """Return the goodput, 0–1, or ``None`` if an earlier start left no records."""
        if self._earlier_seconds is None:
            return None
        wall = self._earlier_seconds + time.monotonic() - self._started_at
        return min(1.0, self._seconds / wall) if wall > 0 else None


def trained(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (last step, seconds) of every window of steps in ``records``. The first records of the run may be missing."""
    windows: list[tuple[int, float]] = []
    before: int | None = None
    for record in records:
        if record["event"] == "train" and before is not None:
            windows.append((record["step"], (record["step"] - before) * record["step_seconds"]))
        if record["event"] in ("train", "run_started", "rollback"):
            before = record["step"]
    return windows
