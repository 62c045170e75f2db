"""The sink that writes report.html: one self-contained page about the run, without network access or scripts."""

from __future__ import annotations

import time
from pathlib import Path

from pretrain.runtime.files import replace_file
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.history import History
from pretrain.telemetry.record import WITH_EVALUATION, Record
from pretrain.telemetry.report.folder import run_of
from pretrain.telemetry.sinks.base import Sink

MAX_SHARE = 0.05  # maximum share of a run's time that drawing may take


class Report(Sink):
    """A sink that writes report.html after every evaluation but the first, and at the end. The page includes earlier starts.

    If evaluations are so frequent that drawing would take more than ``MAX_SHARE`` of the time, some are skipped. If the
    disk is full, writing the page is retried with the next record, without drawing it again, because drawing takes longer than
    a step."""

    def __init__(self) -> None:
        self._run = Path()
        self._evaluated = False
        self._page = ""  # drawn, but not written yet
        self._next_at = 0.0  # on the monotonic clock
        self._history = History()

    def open(self, run: Path, start: RunStarted) -> None:
        self._run, self._history = run, start.history or History()

    def write(self, record: Record) -> None:
        event, over = record["event"], record["event"] == "run_finished"
        self._evaluated |= event == "evaluation" and record["step"] > 0
        complete = event == "data" or event not in WITH_EVALUATION  # `data` is the last record of an evaluation
        if over or (self._evaluated and complete):
            self._evaluated = False
            if over or time.monotonic() >= self._next_at:
                self._page = self._draw()
        if self._page:
            replace_file(self._run / "report.html", self._page)
            self._page = ""

    def close(self) -> None:
        pass

    def _draw(self) -> str:
        from pretrain.telemetry.report.page import run_page

        started_at = time.monotonic()
        page = run_page(run_of(self._run, self._history))
        now = time.monotonic()
        self._next_at = now + (now - started_at) / MAX_SHARE
        return page
