"""Documents from CSV files (RFC 4180: a quoted field may hold commas and line ends), and the offsets at which records end."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from pretrain.data.reading.opening import open_file
from pretrain.data.reading.records import Document, column_index, decode, line_at, lines
from pretrain.data.reading.rows import documents_of_records
from pretrain.data.reading.units import FileRange, ReadOptions, Stamp
from pretrain.runtime.errors import UserError

UTF8_MARK = b"\xef\xbb\xbf"
Record = tuple[int, int, list[str]]  # offset of its first byte, offset after its last byte, its fields


def csv_documents(piece: FileRange, options: ReadOptions) -> Iterator[Document | None]:
    """Yield the document of each record in ``piece``. Raises ``UserError`` for records that do not match the header."""
    names, after_header = header(piece, options)
    if options.by_rows:
        named = (
            ({name: field or None for name, field in zip(names, fields, strict=False)}, partial(line_at, piece, start))
            for start, fields in _fields(piece, options, names, after_header, len(names) - 1)
        )
        yield from documents_of_records(named, options, piece.path, loose=True)
        return
    column = column_index(names, lambda: piece.path, options)
    for _, fields in _fields(piece, options, names, after_header, column):
        yield fields[column]


def _fields(
    piece: FileRange, options: ReadOptions, names: list[str], after_header: int, last: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the offset and the fields of each record, which has at least the field ``last`` and none without a name."""
    place = partial(line_at, piece)
    for start, _, fields in _records(_text_lines(piece, options), place):
        if not fields or start < after_header:
            continue
        if len(fields) <= last or any(fields[len(names) :]):
            raise UserError(
                f"{place(start)}: a record of {len(fields)} fields, but the header has {len(names)}; "
                "a field that contains a comma, a quote or a line end must be quoted"
            )
        yield start, fields


def header(piece: FileRange, options: ReadOptions) -> tuple[list[str], int]:
    """Return the names of the columns and the offset of the first byte after the header."""
    whole_file = FileRange(piece.path, piece.format, 0, piece.stop, piece.size, piece.stamp)
    for _, end, names in _records(_text_lines(whole_file, options), partial(line_at, piece)):
        return names, end
    return [], 0


def record_ends(path: str, stamp: Stamp) -> Iterator[int]:
    """Yield the offset after each record, up to the first invalid one. The reader reports the error when it gets there."""

    def text_lines() -> Iterator[tuple[int, int, str]]:
        with open_file(path, stamp) as file:
            offset = 0
            for line in file:  # the syntax of CSV is ASCII, so latin-1 decodes it in files of any ASCII superset
                start, offset = offset, offset + len(line)
                yield start, offset, (line if start else line.removeprefix(UTF8_MARK)).decode("latin-1")

    try:
        yield from (end for _, end, _ in _records(text_lines(), str))
    except UserError:
        return


def _text_lines(piece: FileRange, options: ReadOptions) -> Iterator[tuple[int, int, str]]:
    return ((offset, offset + len(raw), decode(raw, piece, offset, options)) for offset, raw in lines(piece))


def _records(text_lines: Iterable[tuple[int, int, str]], place: Callable[[int], str]) -> Iterator[Record]:
    """Yield the records of ``text_lines`` (start, end, text). ``place`` returns the description of a byte offset for errors."""
    csv.field_size_limit(sys.maxsize)
    start, end = -1, 0

    def feed() -> Iterator[str]:
        """Yield lines on demand. ``csv.reader`` takes a line only when it needs one, so ``start`` is the offset of the record's
        first line."""
        nonlocal start, end
        for offset, end, line in text_lines:  # noqa: B007
            start = offset if start < 0 else start
            yield line

    reader = csv.reader(feed(), strict=True)
    while True:
        start = -1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a quoted field has no end" if "unexpected end" in str(error) else error
            raise UserError(f"{place(max(start, 0))}: broken CSV ({reason})") from error
        yield start, end, fields
