"""Documents from parquet and arrow files, a few hundred rows at a time. The arrays that pyarrow reads are validated before use,
because an offset outside of its buffer would crash the process instead of raising an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from pretrain.data.reading.opening import open_arrow, parquet_source
from pretrain.data.reading.records import Document, column_index, decode_value, document_of
from pretrain.data.reading.table_rows import ROWS, RowPlace, documents_of_table
from pretrain.data.reading.units import FileRange, ReadOptions, Stamp
from pretrain.data.reading.where import no_column
from pretrain.runtime.errors import UserError, one_line


@contextmanager
def readable_table(path: str, kind: str) -> Iterator[None]:
    """Convert the errors that pyarrow raises for an invalid file into ``UserError``."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable {kind} file, perhaps cut off ({one_line(error)})") from error


@lru_cache(maxsize=1)
def parquet_metadata(path: str, stamp: Stamp) -> Any:
    """Return the footer of a parquet file, which describes its row groups. It is parsed once for all pieces of a file; ``stamp``
    is part of the cache key."""
    import pyarrow.parquet as pq

    return pq.read_metadata(parquet_source(path, stamp))


def is_wanted(column_path: str, options: ReadOptions) -> bool:
    """Return whether a parquet column (such as ``text`` or ``input_ids.list.element``) belongs to a column that is read."""
    names = {*options.text_columns(), "input_ids"}
    names |= {name for path in options.where_columns() for name in (path[0], ".".join(path))}
    return any(column_path == name or column_path.startswith(f"{name}.") for name in names)


def parquet(piece: FileRange, options: ReadOptions) -> Iterator[Document | None]:
    """Yield the documents of a range of row groups."""
    import pyarrow.parquet as pq

    with readable_table(piece.path, "parquet"):
        metadata = parquet_metadata(piece.path, piece.stamp)
        row = sum(metadata.row_group(index).num_rows for index in range(piece.start))
        with pq.ParquetFile(parquet_source(piece.path, piece.stamp), metadata=metadata) as file:
            columns = _needed(piece.path, file.schema_arrow.names, options)
            for batch in file.iter_batches(ROWS, row_groups=list(range(piece.start, piece.stop)), columns=columns):
                if options.by_rows:
                    found = {name: _validated(batch.column(name)) for name in columns}
                    yield from documents_of_table(found, _rows(piece.path), row, options)
                else:
                    yield from _column_documents(batch.column(0), _rows(piece.path, columns[0]), row, options)
                row += batch.num_rows


def parquet_bytes(piece: FileRange, options: ReadOptions) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of the columns that are read, in the row groups of ``piece``."""
    metadata = parquet_metadata(piece.path, piece.stamp)
    for group in (metadata.row_group(index) for index in range(piece.start, piece.stop)):
        for column in (group.column(number) for number in range(group.num_columns)):
            if is_wanted(column.path_in_schema, options):
                start = column.dictionary_page_offset or column.data_page_offset
                if not 0 <= start <= start + column.total_compressed_size <= piece.stamp[0]:
                    raise UserError(f"{piece.path}: not a readable parquet file (a column lies outside the file)")
                yield start, start + column.total_compressed_size


def arrow(piece: FileRange, options: ReadOptions) -> Iterator[Document | None]:
    """Yield the documents of the record batches in a byte range."""
    import pyarrow as pa

    with readable_table(piece.path, "arrow"), open_arrow(piece.path, piece.stamp) as stream:
        schema = arrow_schema(stream)
        columns = _needed(piece.path, schema.names, options)
        stream.seek(piece.start)
        while (at := stream.tell()) < piece.stop:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(stream), schema)
            within = f" of the record batch at byte {at}"
            if options.by_rows:
                found = {name: _validated(batch.column(schema.names.index(name))) for name in columns}
                yield from documents_of_table(found, _rows(piece.path, of=within), 0, options)
            else:
                column = schema.names.index(columns[0])
                yield from _column_documents(batch.column(column), _rows(piece.path, columns[0], within), 0, options)


def arrow_schema(stream: Any) -> Any:
    """Read the schema and return it. The stream is then at the first record batch. The magic of the file format is skipped.

    The body of Arrow's file format is its stream format:
    https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
    """
    import pyarrow as pa

    stream.seek(8 if stream.read(6) == b"ARROW1" else 0)
    return pa.ipc.read_schema(pa.ipc.read_message(stream))


def schema_bytes(path: str, stamp: Stamp) -> int:
    """Return the offset of the first record batch."""
    with open_arrow(path, stamp) as stream:
        arrow_schema(stream)
        return int(stream.tell())


def arrow_batches(path: str, stamp: Stamp) -> Iterator[tuple[int, int]]:
    """Yield the byte range of each record batch. The messages are read through a memory map, so their bodies are not loaded.

    Raises ``UserError`` if the stream has no end marker or has data after it, or if the file's footer has another number of
    record batches.
    """
    import pyarrow as pa

    with readable_table(path, "arrow"), open_arrow(path, stamp, mapped=True) as stream:
        arrow_schema(stream)
        start, count, total = stream.tell(), 0, stream.size()
        while (message := _next_message(stream)) is not None:
            if message.type != "record batch":
                raise UserError(f"{path}: an arrow file with {message.type} messages; save it again as plain text")
            yield start, stream.tell()
            start, count = stream.tell(), count + 1
        if start == total:
            raise UserError(f"{path}: not a readable arrow file, perhaps cut off (it has no end marker)")
        end = stream.tell()
        stream.seek(0)
        if stream.read(6) == b"ARROW1":
            if pa.ipc.open_file(stream).num_record_batches != count:
                raise UserError(f"{path}: not a readable arrow file (its footer and its record batches differ)")
        elif end < total:
            raise UserError(f"{path}: not a readable arrow file (the stream ends at byte {end}, the file at {total})")


def _next_message(stream: Any) -> Any:
    """Return the next message; ``None`` at the end of the stream."""
    import pyarrow as pa

    try:
        return pa.ipc.read_message(stream)
    except EOFError:  # the end-of-stream marker, or the end of the file
        return None


def _needed(path: str, names: list[str], options: ReadOptions) -> list[str]:
    """Return the columns that are read. Raises ``UserError`` if one is missing."""
    needed = dict.fromkeys(names[column_index(names, lambda: path, options, name)] for name in options.text_columns())
    for column in options.where_columns():
        top = next((name for name in (".".join(column), column[0]) if name in names), None)
        if top is None:
            raise no_column(path, column, names)
        needed[top] = None
    return list(needed)


def _rows(path: str, column: str | None = None, of: str = "") -> RowPlace:
    """Return the function that describes a row for messages."""
    inside = "" if column is None else f", column {column!r}"
    return lambda row: f"{path}{inside}, row {row}{of}"


def _column_documents(values: Any, place: RowPlace, first_row: int, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of an array, whose rows are numbered from ``first_row``."""
    values = _validated(values)
    for start in range(0, len(values), ROWS):
        for row, value in enumerate(values.slice(start, ROWS).to_pylist(), first_row + start):
            if isinstance(value, bytes):
                yield decode_value(value, partial(place, row), options)
            elif value is not None:
                yield document_of(value, partial(place, row), options)


def _validated(values: Any) -> Any:
    """Return ``values`` after checking every offset. Text is returned as bytes, because pyarrow decodes an entire array at once
    and its error does not name the row."""
    import pyarrow as pa

    if isinstance(values.type, pa.DictionaryType):
        values.indices.validate(full=True)
        return _validated(values.dictionary).take(values.indices)
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    values = values.view(as_bytes[values.type]) if values.type in as_bytes else values
    values.validate(full=True)
    return values
