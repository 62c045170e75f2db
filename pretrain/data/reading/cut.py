"""Cutting a large file into pieces that can be read independently. Only a few bytes around each cut are read, except for CSV,
where all preceding bytes determine whether a line begins a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO

from pretrain.data.reading.csv_records import record_ends
from pretrain.data.reading.opening import open_file, stamp_of
from pretrain.data.reading.tables import arrow_batches, is_wanted, parquet_metadata, readable_table
from pretrain.data.reading.token_files import TOKEN_FORMATS, token_pieces
from pretrain.data.reading.units import UNIT_BYTES, FileRange, ReadOptions, SourceFile, Stamp, kind_of, reading
from pretrain.runtime.errors import UserError

COMPRESSION_RATIO = 4  # a guess, for the progress bar only
TEXT_WINDOW_BYTES = 1 << 20  # number of bytes that are searched for a paragraph, line, sentence or word boundary
FIRST_WINDOW_BYTES = 64 << 10  # most texts have the end of a paragraph there
NEVER_EMPTY = (
    "parquet",
    "arrow",
    "npy",
    ".gz",
    ".zst",
)  # a valid file of these formats has bytes even without any text
Cut = tuple[int, int, int]  # start, stop, size in bytes


def cut(file: SourceFile, options: ReadOptions) -> list[FileRange]:
    """Return the pieces of one file. Raises ``UserError`` when the file can't be opened in its format."""
    with reading(file.path):
        stamp = _stamp(file)
        file = replace(file, stamp=stamp)
        if not stamp[0] and file.format.endswith(NEVER_EMPTY):
            raise UserError(f"{file.path}: cut off: the file is empty, which is not a valid {file.format} file")
        cuts = CUTTERS.get(_cutter(file.format), _entire_file)(file, options) if stamp[0] else ()
        return [FileRange(file.path, file.format, start, stop, size, stamp) for start, stop, size in cuts]


def _cutter(form: str) -> str:
    """Return the key of ``CUTTERS``; compressed files have none."""
    return kind_of(form) if kind_of(form) in TOKEN_FORMATS else form


def _stamp(file: SourceFile) -> Stamp:
    return file.stamp or stamp_of(file.path)


def _entire_file(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    """Yield the entire file as one piece."""
    size = _stamp(file)[0]
    yield 0, size, size * (COMPRESSION_RATIO if file.format.endswith((".gz", ".zst")) else 1)


def _at_marks(file: SourceFile, find: Callable[[IO[bytes], int, int], int]) -> Iterator[Cut]:
    """Yield byte ranges of about ``UNIT_BYTES``. ``find(file, position, total)`` returns the offset of a valid cut at or after
    ``position``."""
    stamp = _stamp(file)
    start, total = 0, stamp[0]
    with open_file(file.path, stamp) as stream:
        while total - start > UNIT_BYTES * 3 // 2:
            stop = find(stream, start + UNIT_BYTES, total)
            yield start, stop, stop - start
            start = stop
    if total > start:
        yield start, total, total - start


def _after_line(file: IO[bytes], position: int, total: int) -> int:
    """Return the offset after the line that contains ``position``."""
    file.seek(position)
    while chunk := file.readline(1 << 20):
        if chunk.endswith(b"\n"):
            return file.tell()
    return total


def _after_pause(file: IO[bytes], position: int, total: int) -> int:
    """Return the offset after the first paragraph end; if there is none, after the first line end, sentence end or word end. Text
    without any of them is cut between two characters."""
    file.seek(position)
    window = file.read(FIRST_WINDOW_BYTES)
    if b"\n\n" not in window:  # a remote file is not read further than necessary
        window += file.read(TEXT_WINDOW_BYTES - len(window))
    for mark in (b"\n\n", b"\n", b". ", b" "):
        found = window.find(mark)
        if found >= 0:
            return position + found + len(mark)
    start_of_character = re.search(rb"[\x00-\x7f\xc0-\xff]", window)
    return position + (start_of_character.start() if start_of_character else 0)


def _text(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    return _at_marks(file, _after_pause)


def _lines(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    return _at_marks(file, _after_line)


def _csv(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    """Yield byte ranges of complete records of about ``UNIT_BYTES``."""
    start, total = 0, _stamp(file)[0]
    if total > UNIT_BYTES * 3 // 2:
        for end in record_ends(file.path, _stamp(file)):
            if end - start >= UNIT_BYTES:
                yield start, end, end - start
                start = end
    if total > start:
        yield start, total, total - start


def _parquet(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    """Yield ranges of row groups whose text column has about ``UNIT_BYTES``."""
    start = size = 0
    with readable_table(file.path, "parquet"):
        metadata = parquet_metadata(file.path, _stamp(file))
        for index in range(metadata.num_row_groups):
            row_group = metadata.row_group(index)
            columns = [row_group.column(number) for number in range(row_group.num_columns)]
            wanted = [c for c in columns if is_wanted(c.path_in_schema, options)] or columns
            size += sum(column.total_uncompressed_size for column in wanted)
            if size >= UNIT_BYTES or index == metadata.num_row_groups - 1:
                yield start, index + 1, size
                start, size = index + 1, 0


def _arrow(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    """Yield byte ranges of complete record batches of about ``UNIT_BYTES``."""
    start: int | None = None
    stop = 0
    for begin, stop in arrow_batches(file.path, _stamp(file)):
        start = begin if start is None else start
        if stop - start >= UNIT_BYTES:
            yield start, stop, stop - start
            start = None
    if start is not None:
        yield start, stop, stop - start


CUTTERS: dict[str, Callable[[SourceFile, ReadOptions], Iterator[Cut]]] = {
    "text": _text,
    "jsonl": _lines,
    "lines": _lines,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    **dict.fromkeys(TOKEN_FORMATS, token_pieces),
}
