"""Rows of parquet and arrow files of which a document needs several columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from pretrain.data.reading.condition import Path as ColumnPath
from pretrain.data.reading.records import (
    Document,
    column_index,
    decode_value,
    document_of,
    document_of_template,
)
from pretrain.data.reading.units import ReadOptions
from pretrain.data.reading.where import selected

ROWS = 256  # number of rows that are converted to Python objects at a time
RowPlace = Callable[[int], str]  # row number → description of the row for messages


def documents_of_table(
    columns: Mapping[str, Any], place: RowPlace, first_row: int, options: ReadOptions
) -> Iterator[Document | None]:
    """Yield the documents of the rows of a table, and ``None`` for each row that ``where`` removes.

    Args:
        columns: valid pyarrow arrays, with text as bytes.
        place: describes a row for messages.
        first_row: number of the first row.
        options: how documents are read.
    """
    total = len(next(iter(columns.values())))
    for start in range(0, total, ROWS):
        some = {name: values.slice(start, ROWS) for name, values in columns.items()}
        rows = _TableRows(some, place, first_row + start, options)
        if options.where is not None:
            yield from selected([rows], options, place(first_row + start))
        else:
            found = (rows.document(row) for row in range(len(rows)))
            yield from (document for document in found if document is not None)


class _TableRows:
    """Rows of a table."""

    loose = False

    def __init__(self, columns: dict[str, Any], place: RowPlace, first_row: int, options: ReadOptions) -> None:
        self.columns, self._place, self.first_row, self.options = columns, place, first_row, options
        if options.text_template is None:
            names = list(columns)
            needed = [names[column_index(names, lambda: place(first_row), options)]]
        else:
            needed = list(options.text_columns())
        self._text = {name: columns[name].to_pylist() for name in needed}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def names(self) -> list[str]:
        from pyarrow.types import is_struct

        kinds = {name: values.type for name, values in self.columns.items()}
        below = {name: [f"{name}.{field.name}" for field in kind] for name, kind in kinds.items() if is_struct(kind)}
        return [shown for name in kinds for shown in below.get(name) or [name]]

    def array(self, path: ColumnPath) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        dotted = ".".join(path)
        values, below = (self.columns[dotted], ()) if dotted in self.columns else (self.columns[path[0]], path[1:])
        for name in below:
            if not pa.types.is_struct(values.type) or values.type.get_field_index(name) < 0:
                return None
            values = pc.struct_field(values, name)
        if isinstance(values.type, pa.DictionaryType):
            values = values.dictionary_decode()
        return self._decoded(values)

    def document(self, row: int) -> Document | None:
        place = partial(self._place, self.first_row + row)
        values = {name: _decoded(column[row], place, self.options) for name, column in self._text.items()}
        if self.options.text_template is not None:
            return document_of_template(values, place, self.options)
        (value,) = values.values()
        return None if value is None else document_of(value, place, self.options)

    def place(self, row: int) -> str:
        return self._place(self.first_row + row)

    def _decoded(self, values: Any) -> Any:
        """Return text, of whatever type, as large_string; other values unchanged."""
        import pyarrow as pa

        types = pa.types
        if types.is_string(values.type) or types.is_large_string(values.type) or types.is_string_view(values.type):
            return values.cast(pa.large_string())
        if not (
            types.is_binary(values.type) or types.is_large_binary(values.type) or types.is_binary_view(values.type)
        ):
            return values
        try:
            return values.cast(pa.large_string())  # checks that it is UTF-8
        except pa.ArrowInvalid:
            texts = (
                _decoded(value, partial(self.place, row), self.options) for row, value in enumerate(values.to_pylist())
            )
            return pa.array(texts, pa.large_string())


def _decoded(value: Any, place: Callable[[], str], options: ReadOptions) -> Any:
    return decode_value(value, place, options) if isinstance(value, bytes) else value
