"""The share of a run's wall time, since it was first started, that went into training steps that count.

The rest: starting, evaluating, saving, standing still between two starts, and steps that were lost with a crash or a
rollback and are trained again. It is had from what a run leaves anyway: run.json says when it began, metrics.jsonl which
steps are kept. (The word: https://cloud.google.com/blog/products/ai-machine-learning/goodput-metric-as-measure-of-ml-productivity)
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
    """Counts whole windows of steps: of one that is cut in its middle nothing is kept."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._windows: list[tuple[int, float]] = []  # (last step, seconds)
        self._seconds = 0.0  # of them all
        self._earlier_seconds: float | None = 0.0  # since the first start, until this one
        self._started_at = time.monotonic()

    def start(self, event: RunStarted) -> None:
        """Look at what earlier starts have left. Before sinks open, which cut it."""
        records: list[dict[str, Any]] = []
        windows: list[tuple[int, float]] = []
        if event.step:
            with suppress(OSError, ValueError, KeyError, TypeError):  # a file that is broken is worth less than the run
                earlier = records_until(self._run / "metrics.jsonl", event)
                windows, records = trained(earlier), earlier
        self._keep(windows)
        known = earlier_facts(self._run, event).get("started_at")
        if known is None and records:  # a run from before run.json said so
            found = records[0].get("time")
            known = found if isinstance(found, int | float) else None
        now = time.time()
        self._earlier_seconds = None if event.step and not records else max(0.0, now - (known or now))
        self._started_at = time.monotonic()

    def add(self, step: int, seconds: float) -> None:
        self._windows.append((step, seconds))
        self._seconds += seconds

    def go_back(self, step: int) -> None:
        self._keep([window for window in self._windows if window[0] <= step])

    def _keep(self, windows: list[tuple[int, float]]) -> None:
        self._windows = windows
        self._seconds = sum(seconds for _, seconds in windows)

    def share(self) -> float | None:
        """0–1; ``None`` where an earlier start has left no records."""
        if self._earlier_seconds is None:
            return None
        wall = self._earlier_seconds + time.monotonic() - self._started_at
        return min(1.0, self._seconds / wall) if wall > 0 else None


def trained(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(last step, seconds) of every window of steps among the records of a run, whose first may be lost."""
    windows: list[tuple[int, float]] = []
    before: int | None = None
    for record in records:
        if record["event"] == "train" and before is not None:
            windows.append((record["step"], (record["step"] - before) * record["step_seconds"]))
        if record["event"] in ("train", "run_started", "rollback"):
            before = record["step"]
    return windows
