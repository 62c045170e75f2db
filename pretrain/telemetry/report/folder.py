"""A run as its folder tells it, finished or still going."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config.yaml_file import read_yaml
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.telemetry.record import Record
from pretrain.telemetry.report.history import History
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import iter_records, read_records

RECORDS = "metrics.jsonl"


@dataclass
class Run:
    """``facts``: of run.json. ``config``: empty where the folder has none. ``quarantine``: batches that were left out."""

    name: str
    history: History
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    quarantine: list[Record] = field(default_factory=list)

    @property
    def status(self) -> str:
        """running · finished · stopped · failed; of a run whose processes were killed: running."""
        if self.history.end is not None:
            return str(self.history.end.get("status"))
        return "failed" if self.facts.get("status") == "failed" else "running"


def run_of(path: Path, history: History) -> Run:
    """``history`` with what else lies in the run folder; a file that is missing or torn is worth less than the page."""
    name = str(history.start.get("name") or path.resolve().name)
    config, overrides = _yaml(path / "config.yaml"), _yaml(path / ".hydra" / "overrides.yaml")
    try:
        quarantine = read_records(path / "quarantine.jsonl")
    except (OSError, ValueError):
        quarantine = []
    return Run(
        name,
        history,
        read_run_file(path),
        config if isinstance(config, dict) else {},
        [str(o) for o in overrides] if isinstance(overrides, list) else [],
        [r for r in quarantine if isinstance(r, dict)],
    )


def read_run(path: Path) -> Run:
    """The run in the folder ``path``. A line of its records that is none is left out, with a notice.

    Raises ``UserError`` for a folder that is no run, and for a record that lacks what its event has.
    """
    file = path / RECORDS
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    if not file.is_file():
        raise UserError(f"{path}: not a run folder: it has no {RECORDS}")
    history = History()
    number = 0
    try:
        for number, record in enumerate(iter_records(file, torn=_say_torn), start=1):  # noqa: B007 (used below)
            history.add(record)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: record {number} can't be read: {type(error).__name__}: {error}") from None
    return run_of(path, history)


def _say_torn(where: str) -> None:
    notice(f"{where}: torn (the run was killed while writing it, or writes it now); passed over")


def _yaml(path: Path) -> Any:
    try:
        return read_yaml(path)
    except UserError:
        return None
