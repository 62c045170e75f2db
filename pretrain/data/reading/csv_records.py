"""Documents out of CSV (RFC 4180: a quoted field may hold commas and line ends), and where its records end."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from pretrain.data.reading.records import Document, column_index, decode, line_at, lines
from pretrain.data.reading.units import FileRange, ReadOptions
from pretrain.runtime.errors import UserError

UTF8_MARK = b"\xef\xbb\xbf"
Record = tuple[int, int, list[str]]  # the bytes it begins and ends at, its fields


def csv_documents(piece: FileRange, options: ReadOptions) -> Iterator[Document]:
    names, after_header = header(piece, options)
    column = column_index(names, lambda: piece.path, options)
    place = partial(line_at, piece)
    for start, _, fields in _records(_text_lines(piece, options), place):
        if not fields or start < after_header:
            continue
        if len(fields) <= column or any(fields[len(names) :]):
            raise UserError(
                f"{place(start)}: a record of {len(fields)} fields, but the header has {len(names)}; "
                "a field with a comma, a quote or a line end in it stands between quotes"
            )
        yield fields[column]


def header(piece: FileRange, options: ReadOptions) -> tuple[list[str], int]:
    """The names of the columns, and the byte after them."""
    whole_file = FileRange(piece.path, piece.format, 0, piece.stop, piece.size, piece.stamp)
    for _, end, names in _records(_text_lines(whole_file, options), partial(line_at, piece)):
        return names, end
    return [], 0


def record_ends(path: str) -> Iterator[int]:
    """The byte after each record, as far as the file is CSV; what is wrong behind that, its reader says."""

    def text_lines() -> Iterator[tuple[int, int, str]]:
        with open(path, "rb") as file:
            offset = 0
            for line in file:  # all that means something in CSV is ASCII, so that any encoding will do
                start, offset = offset, offset + len(line)
                yield start, offset, (line if start else line.removeprefix(UTF8_MARK)).decode("latin-1")

    try:
        yield from (end for _, end, _ in _records(text_lines(), str))
    except UserError:
        return


def _text_lines(piece: FileRange, options: ReadOptions) -> Iterator[tuple[int, int, str]]:
    return ((offset, offset + len(raw), decode(raw, piece, offset, options)) for offset, raw in lines(piece))


def _records(text_lines: Iterable[tuple[int, int, str]], place: Callable[[int], str]) -> Iterator[Record]:
    """The records of ``text_lines`` (start, end, text). ``place``: what an error calls the byte at which a record begins."""
    csv.field_size_limit(sys.maxsize)
    start, end = -1, 0

    def feed() -> Iterator[str]:
        """``csv.reader`` takes a line when it needs it, so that ``start`` is that of the record's first line."""
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
