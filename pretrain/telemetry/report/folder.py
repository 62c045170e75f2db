"""Read a run, finished or still running, from its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pretrain.config.yaml_file import read_yaml
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.telemetry.history import History
from pretrain.telemetry.record import Record
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import iter_records, read_records

RECORDS = "metrics.jsonl"


@dataclass
class Run:
    """A run as read from its folder.

    Attributes:
        name: Name of the run.
        history: Its records.
        facts: Content of run.json.
        config: Content of config.yaml; empty if there is none.
        overrides: Overrides of the command line.
        quarantine: Records of quarantine.jsonl, one per batch that the guard skipped.
    """

    name: str
    history: History
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    quarantine: list[Record] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Return running · finished · stopped · failed. A run whose processes were all killed counts as running."""
        if self.history.end is not None:
            return str(self.history.end.get("status"))
        return "failed" if self.facts.get("status") == "failed" else "running"


def run_of(path: Path, history: History) -> Run:
    """Combine ``history`` with the other files of the run folder. Files that are missing or damaged are left out, because the
    page is useful without them."""
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
    """Read the run in the folder ``path``. A line of metrics.jsonl that is not a record is skipped with a notice.

    Raises ``UserError`` if the folder is not a run folder, or if a record lacks a required field of its event.
    """
    file = path / RECORDS
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    if not file.is_file():
        raise UserError(f"{path}: not a run folder: it has no {RECORDS}")

    def refuse(number: int, error: Exception) -> NoReturn:
        raise UserError(f"{file}: record {number} can't be read: {type(error).__name__}: {error}") from None

    try:
        history = History(iter_records(file, on_incomplete=_report_incomplete), on_invalid=refuse)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    return run_of(path, history)


def _report_incomplete(where: str) -> None:
    notice(f"{where}: incomplete line (the run was killed while writing it, or is writing it now); skipped")


def _yaml(path: Path) -> Any:
    try:
        return read_yaml(path)
    except UserError:
        return None
