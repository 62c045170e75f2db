"""The documents of records: the value of a column, or what ``text_template`` makes of several."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pretrain.data.reading.condition import Path as ColumnPath
from pretrain.data.reading.records import Document, Location, document_of, document_of_record
from pretrain.data.reading.units import ReadOptions
from pretrain.data.reading.where import selected
from pretrain.runtime.errors import UserError

ROWS = 256  # number of rows for which a condition is computed at a time
Record = tuple[Any, Location]  # a value and its place


def documents_of_records(
    records: Iterable[Record], options: ReadOptions, path: str, *, loose: bool = False
) -> Iterator[Document | None]:
    """Yield the documents of ``records``, and ``None`` for each record that ``where`` removes.

    Args:
        records: the values of a file; an object's keys are its columns.
        options: how documents are read.
        path: the file, for messages.
        loose: all values are text, whatever they mean (CSV).
    """
    if options.where is None:
        for record, place in records:
            if (document := document_of_record(record, place, options)) is not None:
                yield document
        return
    iterator = iter(records)
    chunks = iter(lambda: list(itertools.islice(iterator, ROWS)), [])
    yield from selected((_RecordRows(chunk, options, loose) for chunk in chunks), options, path)


def documents_of_texts(texts: Iterable[Document | None], options: ReadOptions, path: str) -> Iterator[Document | None]:
    """Yield the documents of a format without columns. In ``where`` the text is the column ``text_column``.

    Raises ``UserError`` with ``text_template``, which joins columns.
    """
    if options.text_template is not None:
        raise UserError(f"{path}: no columns to join in this file (dataset.text_template={options.text_template!r})")
    records = (({options.text_column: text}, _numbered(path, number)) for number, text in enumerate(texts))
    return documents_of_records(records, options, path)


def _numbered(path: str, number: int) -> Location:
    return lambda: f"{path}, document {number}"


class _RecordRows:
    """Rows that are JSON values."""

    def __init__(self, records: Sequence[Record], options: ReadOptions, loose: bool) -> None:
        self.records, self.options, self.loose = records, options, loose
        for record, place in records:
            if not isinstance(record, dict):
                raise UserError(f"{place()}: a value without columns, which dataset.where needs")

    def __len__(self) -> int:
        return len(self.records)

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for record, _ in self.records for name in _names(record)))

    def array(self, path: ColumnPath) -> Any:
        found = [_field(record, path) for record, _ in self.records]
        if all(value is MISSING for value in found):
            return None
        return self._typed([None if value is MISSING else value for value in found], ".".join(path))

    def document(self, row: int) -> Document | None:
        record, place = self.records[row]
        return document_of_record(record, place, self.options)

    def place(self, row: int) -> str:
        return self.records[row][1]()

    def _typed(self, values: list[Any], column: str) -> Any:
        """Return the values as a pyarrow array. Raises ``UserError`` where they are of several kinds."""
        import pyarrow as pa

        present = [(row, value) for row, value in enumerate(values) if value is not None]
        kinds = {row: _kind(value) for row, value in present}
        if len(set(kinds.values())) > 1:
            first = next(iter(kinds.values()))
            row, other = next((row, kind) for row, kind in kinds.items() if kind != first)
            raise UserError(f"{self.place(row)}: dataset.where: column {column!r} holds {first} and {other}")
        kind = next(iter(kinds.values()), None)
        if kind == "text":
            texts = {row: document_of(value, self.records[row][1], self.options) for row, value in present}
            return pa.array([texts.get(row) for row in range(len(values))], pa.large_string())
        if kind == "numbers":
            whole = all(isinstance(value, int) and abs(value) < 2**63 for _, value in present)
            numbers = [None if value is None else _float(value) for value in values]
            return pa.array(values, pa.int64()) if whole else pa.array(numbers, pa.float64())
        if kind == "lists":
            lengths = [0 if value is None else len(value) for value in values]
            offsets = pa.array([0, *itertools.accumulate(lengths)], pa.int64())
            missing = pa.array([value is None for value in values])
            return pa.LargeListArray.from_arrays(offsets, pa.nulls(sum(lengths)), mask=missing)
        if kind == "objects":
            return pa.array([None if value is None else {} for value in values], pa.struct([]))
        return pa.array(values, pa.bool_() if kind else pa.null())


MISSING = object()


def _names(record: dict[str, Any]) -> Iterator[str]:
    """Yield the keys of an object, and instead of those that hold an object, the keys of that, as in ``meta.lang``."""
    for name, value in record.items():
        yield from (f"{name}.{below}" for below in value) if isinstance(value, dict) and value else (name,)


def _field(record: dict[str, Any], path: ColumnPath) -> Any:
    """Return the value at ``path``; ``MISSING`` if the record has none. A key that contains dots comes first."""
    if (dotted := ".".join(path)) in record:
        return record[dotted]
    value: Any = record
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def _kind(value: Any) -> str:
    """Return the kind of a JSON value, for messages."""
    kinds = ((bool, "truth values"), (int | float, "numbers"), (str, "text"), (dict, "objects"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "lists")


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return float("inf") if value > 0 else float("-inf")
