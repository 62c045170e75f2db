"""Where a large file may be cut so that its pieces can be read alone: looks at a few bytes around each cut, not at
the file (but for CSV, where only the quotes before a line tell whether it is one)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pretrain.data.units import UNIT_BYTES, Piece, ReadOptions, SourceFile, reading, stamp_of
from pretrain.errors import UserError

COMPRESSION_RATIO = 4  # a guess, for the progress bar only
TEXT_WINDOW_BYTES = 1 << 20  # how far to look for a pleasant place to cut
Cut = tuple[int, int, int]  # start, stop, size in bytes


def cut(file: SourceFile, options: ReadOptions) -> list[Piece]:
    """The pieces of one file. Raises ``UserError`` when the file cannot be opened as what it says it is."""
    with reading(file.path):
        stamp = stamp_of(file.path)
        cuts = CUTTERS.get(file.format, _whole)(file, options) if stamp[0] else ()
        return [Piece(file.path, file.format, start, stop, size, stamp) for start, stop, size in cuts]


def _whole(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    size = Path(file.path).stat().st_size
    yield 0, size, size * (COMPRESSION_RATIO if file.format.endswith((".gz", ".zst")) else 1)


def _at_marks(path: str, find: Callable[[IO[bytes], int, int], int]) -> Iterator[Cut]:
    """Byte ranges of about UNIT_BYTES; ``find(file, position, total)`` says where the cut near ``position`` may be."""
    total = Path(path).stat().st_size
    start = 0
    with open(path, "rb") as file:
        while total - start > UNIT_BYTES * 3 // 2:
            stop = find(file, start + UNIT_BYTES, total)
            yield start, stop, stop - start
            start = stop
    if total > start:
        yield start, total, total - start


def _after_line(file: IO[bytes], position: int, total: int) -> int:
    file.seek(position)
    while chunk := file.readline(1 << 20):
        if chunk.endswith(b"\n"):
            return file.tell()
    return total


def _after_pause(file: IO[bytes], position: int, total: int) -> int:
    """After a paragraph, line, sentence or word; text without any of them is cut between two characters."""
    file.seek(position)
    window = file.read(TEXT_WINDOW_BYTES)
    for mark in (b"\n\n", b"\n", b". ", b" "):
        found = window.find(mark)
        if found >= 0:
            return position + found + len(mark)
    start_of_character = re.search(rb"[\x00-\x7f\xc0-\xff]", window)
    return position + (start_of_character.start() if start_of_character else 0)


def _text(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    return _at_marks(file.path, _after_pause)


def _lines(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    return _at_marks(file.path, _after_line)


def _csv(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    """A line ends a record where the quotes before it are even in number (RFC 4180)."""
    total = Path(file.path).stat().st_size
    start = position = quotes = 0
    if total > UNIT_BYTES * 3 // 2:
        with open(file.path, "rb") as stream:
            for line in stream:
                position += len(line)
                quotes += line.count(b'"')
                if position - start >= UNIT_BYTES and quotes % 2 == 0:
                    yield start, position, position - start
                    start = position
    if total > start:
        yield start, total, total - start


def _parquet(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    """Ranges of row groups whose text column makes about UNIT_BYTES."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        metadata = pq.read_metadata(file.path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file.path}: not a readable parquet file, perhaps cut off ({_one_line(error)})") from error
    start = size = 0
    for index in range(metadata.num_row_groups):
        row_group = metadata.row_group(index)
        columns = [row_group.column(number) for number in range(row_group.num_columns)]
        wanted = [c for c in columns if c.path_in_schema.split(".")[0] in (options.text_column, "input_ids")] or columns
        size += sum(column.total_uncompressed_size for column in wanted)
        if size >= UNIT_BYTES or index == metadata.num_row_groups - 1:
            yield start, index + 1, size
            start, size = index + 1, 0


def _arrow(file: SourceFile, options: ReadOptions) -> Iterator[Cut]:
    """Byte ranges of whole record batches; the messages are walked over a memory map, their bodies stay unread."""
    import pyarrow as pa

    try:
        with pa.memory_map(file.path) as stream:
            stop = start = skip_to_batches(stream)
            total = stream.size()
            while stop < total and (message := _next_message(stream)) is not None:
                if message.type != "record batch":
                    raise UserError(
                        f"{file.path}: an arrow file with {message.type} messages; save it again as plain text"
                    )
                stop = stream.tell()
                if stop - start >= UNIT_BYTES:
                    yield start, stop, stop - start
                    start = stop
            if stop > start:
                yield start, stop, stop - start
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: not a readable arrow file, perhaps cut off ({_one_line(error)})") from error


def skip_to_batches(stream: Any) -> int:
    """Read past the magic (file format only) and the schema; return the position of the first record batch.

    The body of Arrow's file format is its stream format:
    https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
    """
    import pyarrow as pa

    stream.seek(8 if stream.read(6) == b"ARROW1" else 0)
    pa.ipc.read_message(stream)
    return int(stream.tell())


def _next_message(stream: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.read_message(stream)
    except EOFError:  # the end-of-stream marker
        return None


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


CUTTERS: dict[str, Callable[[SourceFile, ReadOptions], Iterator[Cut]]] = {
    "text": _text,
    "jsonl": _lines,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
