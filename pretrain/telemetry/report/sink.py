"""report.html: one self-contained page about the run. No network, no script."""

from __future__ import annotations

import time
from pathlib import Path

from pretrain.events import RunStarted
from pretrain.replace import replace_file
from pretrain.telemetry.jsonl import records_until
from pretrain.telemetry.record import Record
from pretrain.telemetry.report.folder import RECORDS, run_of
from pretrain.telemetry.report.history import History

LARGEST_SHARE = 0.05  # of a run's time


class Report:
    """Written once at every evaluation but the first, and at the end, about the run and what it continues. Where evaluations
    come so fast that drawing would take more than a share of the time, some are passed over."""

    def __init__(self) -> None:
        self._run = Path()
        self._due = False
        self._next_at = 0.0  # on the monotonic clock
        self.history = History()

    def open(self, run: Path, start: RunStarted) -> None:
        self._run = run
        earlier = run / RECORDS
        if start.step and earlier.exists():
            self.history = History(records_until(earlier, start))
        else:  # without a file: after a rollback, its own
            self.history.cut(start.step)

    def write(self, record: Record) -> None:
        self.history.add(record)
        evaluated = record["event"] == "evaluation" and self._all_scored(record["step"])
        if record["event"] == "run_finished" or (evaluated and time.monotonic() >= self._next_at):
            self._due = True
        if self._due:
            self._draw()
            self._due = False  # with a full disk it stays due, and is tried again with the next record

    def close(self) -> None:
        pass

    def _all_scored(self, step: int) -> bool:
        """Whether every domain has its record of ``step``: they come one by one."""
        return step > 0 and all(domain.last["step"] == step for domain in self.history.domains.values())

    def _draw(self) -> None:
        from pretrain.telemetry.report.page import run_page

        started_at = time.monotonic()
        replace_file(self._run / "report.html", run_page(run_of(self._run, self.history)))
        now = time.monotonic()
        self._next_at = now + (now - started_at) / LARGEST_SHARE
