"""The interface of sinks, which write a run's records. To add a sink, write a subclass of `Sink` in this folder, and a YAML
under ``conf/sink`` that nests it under its key."""

from __future__ import annotations

from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import Record


class Sink(Protocol):
    """A destination of records, configured by its constructor.

    An exception from any method drops the sink and never stops the run. The exception is ``write``: if it raises because the
    disk is full, the sink is kept and called again with the next record. A sink that does not work everywhere also has a
    method ``check``, which is called before anything heavy is imported and raises ``UserError``."""

    @abstractmethod
    def open(self, run: Path, start: RunStarted) -> None:
        """Start or resume writing. ``run`` is the run folder, ``start.step`` the number of steps already done. Records of
        later steps are obsolete, because those steps are trained again."""
        ...

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write one record."""
        ...

    @abstractmethod
    def close(self) -> None:
        """Flush and close. The sink may be opened again after a rollback."""
        ...


def require(package: str, *, sink: str) -> None:
    """Raise ``UserError`` if the package that ``sink`` needs is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a plain folder of that name is found too, without an origin
        raise UserError(f"sink={sink} needs the package {package}: pip install 'pretrain[{package}]'")
