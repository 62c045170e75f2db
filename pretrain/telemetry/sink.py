"""Where numbers go. To add a sink: a class here with these three methods, and a YAML under ``conf/sink`` nesting its key."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pretrain.events import RunStarted
from pretrain.telemetry.record import Record


class Sink(Protocol):
    """Configured by its constructor. An exception from any method drops this sink and never stops the run."""

    def open(self, run: Path, start: RunStarted) -> None:
        """``run``: the run folder. ``start.step``: steps already done; records beyond it are of steps trained again."""
        ...

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...
