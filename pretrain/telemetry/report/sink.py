"""report.html: one self-contained page about the run. No network, no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.events import RunStarted
from pretrain.replace import replace_file
from pretrain.telemetry.jsonl import records_until
from pretrain.telemetry.report.page import page


class Report:
    """Written at every evaluation and at the end, from the records of the run and of the runs it continues."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._path = Path("report.html")

    def open(self, run: Path, start: RunStarted) -> None:
        self._path = run / "report.html"
        earlier = run / "metrics.jsonl"
        if start.step and earlier.exists():
            self._records = records_until(earlier, start.step, owes_evaluation=start.owes_evaluation)
        else:  # without a file: after a rollback, its own
            self._records = [r for r in self._records if r["step"] <= start.step]

    def write(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if record["event"] == "run_finished" or (record["event"] == "evaluation" and record["step"]):
            replace_file(self._path, page(self._records))

    def close(self) -> None:
        pass
