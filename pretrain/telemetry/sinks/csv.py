"""train.csv, evaluation.csv and, where there are such records, layers.csv and data.csv: tables for spreadsheets and pandas
(RFC 4180: a header, commas, CRLF; null is an empty field)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pretrain.runtime.atomic_files import replace_file
from pretrain.runtime.console import notice
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import WITH_EVALUATION, Record
from pretrain.telemetry.sinks.base import Sink
from pretrain.telemetry.sinks.jsonl import keep_broken
from pretrain.telemetry.sinks.retrying_file import RetryingAppendFile

# event → what has a row for each name
FAMILY = {"train": None, "evaluation": None, "layers": "layers", "data": "sources"}
Row = Mapping[str, object]


class Csv(Sink):
    """One table an event. Its header is that of its first record; where a later one has more (another version has gone on
    with the run), the table is written once more with new columns at its end."""

    def __init__(self) -> None:
        self._tables: dict[str, Table] = {}

    def open(self, run: Path, start: RunStarted) -> None:
        self._tables = {event: Table(run / f"{event}.csv", start) for event in FAMILY}

    def write(self, record: Record) -> None:
        if record["event"] in FAMILY:
            for row in rows(record):
                self._tables[record["event"]].write(row)

    def close(self) -> None:
        for table in self._tables.values():
            table.close()


class Table:
    """A CSV file with a column ``step``. Rows of steps beyond ``start.step`` are cut: they are about to be written again."""

    def __init__(self, path: Path, start: RunStarted) -> None:
        self._path = path
        self._columns: list[str] = []
        self._file: RetryingAppendFile | None = None
        if path.exists():
            odd: list[str] = []
            rows = read_rows(path, say=odd.append) if start.step else []
            keep_broken(path, odd)
            self._rewrite([row for row in rows if not _comes_again(path.stem, row, start)], [])

    def write(self, row: Row) -> None:
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
        """Replace the file by the rows ``kept``, with ``new`` columns at its end; without rows there is no file."""
        if not kept:
            self._columns = []
            self._path.unlink()
            return
        self._columns = [*kept[0], *new]
        header = dict(zip(self._columns, self._columns, strict=True))
        replace_file(self._path, "".join(self._line(row) for row in [header, *kept]))


def rows(record: Record) -> list[Row]:
    """A row for the record, or one for each of its layers or sources."""
    family = FAMILY[record["event"]]
    own = {key: value for key, value in record.items() if key not in ("event", family)}
    if family is None:
        return [own]
    return [own | {family.removesuffix("s"): name} | numbers for name, numbers in record[family].items()]


def read_rows(path: Path, *, say: Callable[[str], None] = notice) -> list[dict[str, str]]:
    """The rows of a table. A torn last one (the run was killed while writing it) is left out, and any other that does not
    fit the header too; ``say`` is told of those. A quote that is never closed spoils its own line only. A program that has
    saved the table may have ended its lines as Unix does.
    """
    text = path.read_bytes().decode(errors="replace")
    end = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    lines = text.split(end)[:-1]
    if not lines:
        return []
    header, *rows = (_cells(line.removesuffix("\r")) for line in lines)
    found = []
    for number, cells in enumerate(rows, start=2):
        row = dict(zip(header, cells, strict=False))
        if len(cells) == len(header) and re.fullmatch("[0-9]{1,18}", row.get("step", "")):
            found.append(row)
        else:
            say(f"{path}:{number}: not a row of this table; it is left out, those after it are kept")
    return found


def _cells(line: str) -> list[str]:
    """Those of one line; none where it is not one row."""
    try:
        rows = [*csv.reader([line])]
    except csv.Error:
        return []
    return rows[0] if len(rows) == 1 else []


def _comes_again(event: str, row: dict[str, str], start: RunStarted) -> bool:
    step = int(row["step"])
    return step > start.step or (step == start.step and event in WITH_EVALUATION and start.pending_evaluation)
