"""Write train.csv, evaluation.csv and, if there are such records, metric.csv, layers.csv, data.csv and parts.csv: tables for
spreadsheets and pandas (RFC 4180: a header, commas, CRLF; null is an empty field)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pretrain.runtime.console import notice
from pretrain.runtime.files import replace_file
from pretrain.runtime.lines import complete_lines
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import WITH_EVALUATION, Record
from pretrain.telemetry.sinks.base import Sink
from pretrain.telemetry.sinks.jsonl import keep_broken
from pretrain.telemetry.sinks.retrying_file import RetryingAppendFile

# table → the event, and its field that maps names to records, which become one row per name
TABLES = {
    "train": ("train", None),
    "evaluation": ("evaluation", None),
    "metric": ("metric", None),
    "layers": ("layers", "layers"),
    "data": ("data", "sources"),
    "parts": ("data", "parts"),  # of a mixture
}
Row = Mapping[str, object]
LONGEST_LINE = (
    2**17
)  # characters; the csv module's own limit of a cell is one of the process, which reading data raises


class Csv(Sink):
    """One table per event. The first record defines the header. If a later record has more fields (another version resumed
    the run), the table is rewritten with the new columns at its end."""

    def __init__(self) -> None:
        self._tables: dict[str, Table] = {}

    def open(self, run: Path, start: RunStarted) -> None:
        self._tables = {name: Table(run / f"{name}.csv", start) for name in TABLES}

    def write(self, record: Record) -> None:
        for name in TABLES:
            for row in rows(name, record):
                self._tables[name].write(row)

    def close(self) -> None:
        for table in self._tables.values():
            table.close()


class Table:
    """A CSV file with a column ``step``. Rows of steps after ``start.step`` are removed, because they will be written
    again."""

    def __init__(self, path: Path, start: RunStarted) -> None:
        self._path = path
        self._columns: list[str] = []
        self._file: RetryingAppendFile | None = None
        if path.exists():
            invalid: list[str] = []
            rows = read_rows(path, on_invalid=invalid.append) if start.step else []
            keep_broken(path, invalid)
            self._rewrite([row for row in rows if not _is_rewritten(path.stem, row, start)], [])

    def write(self, row: Row) -> None:
        """Append a row; rewrite the table if the row has new columns."""
        new = [column for column in row if column not in self._columns]
        if new and self._columns:
            self.close()
            self._rewrite(read_rows(self._path), new)
        elif new:
            self._columns = new
            self._append(self._line(dict(zip(new, new, strict=True))))
        self._append(self._line(row))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: str) -> None:
        if self._file is None:
            self._file = RetryingAppendFile(self._path)
        self._file.write(line.encode())

    def _line(self, row: Row) -> str:
        text = io.StringIO()
        csv.writer(text).writerow(["" if row.get(c) is None else row[c] for c in self._columns])
        return text.getvalue()

    def _rewrite(self, kept: Sequence[Row], new: list[str]) -> None:
        """Replace the file by the rows ``kept`` with the columns ``new`` added at the end; without rows, delete the file."""
        if not kept:
            self._columns = []
            self._path.unlink()
            return
        self._columns = [*kept[0], *new]
        header = dict(zip(self._columns, self._columns, strict=True))
        replace_file(self._path, "".join(self._line(row) for row in [header, *kept]))


def rows(table: str, record: Record) -> list[Row]:
    """Return the rows of ``record`` in a table: none, one, or one per layer, source or part."""
    event, family = TABLES[table]
    if record["event"] != event or (table == "parts" and len(record.get("parts") or {}) < 2):
        return []
    families = [other for of, other in TABLES.values() if of == event and other]
    own = {key: value for key, value in record.items() if key not in ("event", *families)}
    if family is None:
        return [own]
    return [own | {family.removesuffix("s"): name} | numbers for name, numbers in record[family].items()]


def read_rows(path: Path, *, on_invalid: Callable[[str], None] = notice) -> list[dict[str, str]]:
    """Return the rows of a table.

    An incomplete last row (the run was killed while writing it) is skipped, and so is any other row that does not fit the
    header; the latter are reported to ``on_invalid``. An unclosed quote affects only its own line. Lines may end in LF too,
    because another program may have saved the table.
    """
    text = path.read_bytes().decode(errors="replace")
    end = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    lines = complete_lines(text, end)
    if not lines:
        return []
    header, *rows = (_cells(line.removesuffix("\r")) for line in lines)
    found = []
    for number, cells in enumerate(rows, start=2):
        row = dict(zip(header, cells, strict=False))
        if len(cells) == len(header) and re.fullmatch("[0-9]{1,18}", row.get("step", "")):
            found.append(row)
        else:
            on_invalid(f"{path}:{number}: not a row of this table; it is skipped, later rows are kept")
    return found


def _cells(line: str) -> list[str]:
    """Return the cells of a line, or none if the line is not exactly one row."""
    if len(line) > LONGEST_LINE:
        return []
    try:
        rows = [*csv.reader([line])]
    except csv.Error:
        return []
    return rows[0] if len(rows) == 1 else []


def _is_rewritten(table: str, row: dict[str, str], start: RunStarted) -> bool:
    step, (event, _) = int(row["step"]), TABLES[table]
    return step > start.step or (step == start.step and event in WITH_EVALUATION and start.pending_evaluation)
