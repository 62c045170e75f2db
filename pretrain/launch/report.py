"""What a failing worker tells its parent: a small file, so that it arrives whatever state the process is in."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import UserError


@dataclass(frozen=True)
class Report:
    """``message``: one line for a mistake, the exception's for a bug, whose ``trace`` is the whole traceback."""

    rank: int
    message: str
    trace: str
    time: float
    is_mistake: bool = False

    @property
    def first_line(self) -> str:
        return self.message.splitlines()[0] if self.message else "failed"

    def told(self, logs: Path) -> str:
        """For the person at the terminal: once, and where to read more."""
        more = f"{logs}/rank-{self.rank}.log"
        return (
            f"rank {self.rank} {self.message}; see {more}"
            if not self.trace
            else f"{self.trace}rank {self.rank} failed; see {more}"
        )


def write_report(folder: Path, rank: int, error: BaseException) -> None:
    mistake = isinstance(error, UserError)
    message = str(error) if mistake else f"failed: {type(error).__name__}: {error}"
    trace = "" if mistake else "".join(traceback.format_exception(error))
    report = Report(rank, message, trace, time.time(), mistake)
    partial = folder / f"rank-{rank}.partial"
    partial.write_text(json.dumps(asdict(report)))
    partial.rename(folder / f"rank-{rank}.json")


def read_reports(folder: Path) -> Iterator[Report]:
    for file in folder.glob("rank-*.json"):
        yield Report(**json.loads(file.read_text()))
