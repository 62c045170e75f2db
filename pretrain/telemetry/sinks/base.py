"""Where numbers go. To add a sink: a subclass of `Sink` here, and a YAML under ``conf/sink`` nesting its key."""

from __future__ import annotations

from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import Record


class Sink(Protocol):
    """Configured by its constructor. An exception from any method drops this sink and never stops the run; of a full disk
    only ``write`` may tell, and is asked again with the next record. One that can't work everywhere has a method ``check``
    too, called before anything heavy is imported: it raises ``UserError``."""

    @abstractmethod
    def open(self, run: Path, start: RunStarted) -> None:
        """``run``: the run folder. ``start.step``: steps already done; records beyond it are of steps trained again."""
        ...

    @abstractmethod
    def write(self, record: Record) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


def require(package: str, *, sink: str) -> None:
    """Raises ``UserError`` where a package that ``sink`` needs is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise UserError(f"sink={sink} needs the package {package}: pip install 'pretrain[{package}]'")
