"""Documents out of pieces of files, one generator per format, each in bounded memory. A document is text, or token
ids where the data was tokenized elsewhere. Every error names the file and the place in it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.cut import skip_to_batches
from pretrain.data.prose import docstrings, package_description, topics
from pretrain.data.sections import sections
from pretrain.data.units import Piece, ReadOptions, key_of, reading, stamp_of
from pretrain.errors import UserError

Document = str | NDArray[np.int64]
BLOCK_BYTES = 8 << 20
ROWS = 256  # rows of a column that are Python objects at a time


def read(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    """The documents of ``piece`` in order, without those that hold nothing but white space.

    Raises:
        UserError: the bytes are not what the format promises, or the file changed since it was listed.
    """
    with reading(piece.path):
        for document in READERS[piece.format.partition(".")[0]](piece, options):
            if len(document) and not (isinstance(document, str) and document.isspace()):
                yield document
        if stamp_of(piece.path) != piece.stamp:
            raise UserError(
                f"{piece.path}: the file changed while it was being read; start again when nothing writes to it"
            )


def digest(piece: Piece, options: ReadOptions) -> str:
    """Hash of the bytes that decide what ``read`` yields."""
    state = xxhash.xxh3_128(key_of(piece.format, *asdict(options).values()).encode())
    with reading(piece.path), open(piece.path, "rb") as file:
        for start, stop in _deciding_bytes(piece, options):
            file.seek(start)
            while start < stop and (block := file.read(min(stop - start, BLOCK_BYTES))):
                state.update(block)
                start += len(block)
    return state.hexdigest()


def _deciding_bytes(piece: Piece, options: ReadOptions) -> Iterator[tuple[int, int]]:
    """The byte ranges of the file that ``piece`` is made of, what names its columns first."""
    if piece.format == "parquet":
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(piece.path)
        groups = [metadata.row_group(index) for index in range(piece.start, piece.stop)]
        for column in (group.column(number) for group in groups for number in range(group.num_columns)):
            if column.path_in_schema.split(".")[0] in (options.text_column, "input_ids"):
                start = column.dictionary_page_offset or column.data_page_offset
                yield start, start + column.total_compressed_size
        return
    if piece.format == "csv" and piece.start:
        with open(piece.path, "rb") as file:
            yield 0, len(file.readline())
    if piece.format == "arrow":
        yield 0, _schema_bytes(piece.path)
    yield piece.start, piece.stop


# Text ----------------------------------------------------------------------------------------------------------------


def _blocks(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) in blocks of BLOCK_BYTES that end at a line where there is one."""
    with _open(piece) as file:
        offset = piece.start
        while block := file.read(min(BLOCK_BYTES, piece.stop - offset) if _plain(piece) else BLOCK_BYTES):
            if len(block) == BLOCK_BYTES:
                block += file.readline(BLOCK_BYTES)
            yield offset, block
            offset += len(block)


def _text(piece: Piece, options: ReadOptions) -> Iterator[str]:
    for offset, block in _blocks(piece):
        yield from sections(_decode(block, piece, offset, options), options.max_document_chars)


def _whole_text(piece: Piece, options: ReadOptions) -> str:
    return "".join(_decode(block, piece, offset, options) for offset, block in _blocks(piece))


def _lines(piece: Piece, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    with _open(piece) as file:
        offset = piece.start
        while (not _plain(piece) or offset < piece.stop) and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _jsonl(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    for offset, raw in _lines(piece, options):
        line = _decode(raw, piece, offset, options)
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{_at_line(piece, offset)}: broken JSON line ({error})") from error
        if (document := _of_record(record, partial(_at_line, piece, offset), options)) is not None:
            yield document


def _json(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    """A list of records, one record, or JSON lines under the name .json (which is common)."""
    with _open(piece) as file:
        head = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"{" and _is_json(head.partition(b"\n")[0]):
        yield from _jsonl(piece, options)
        return
    for index, record in enumerate(_json_items(piece, options)):
        if (document := _of_record(record, partial("{}, record {}".format, piece.path, index), options)) is not None:
            yield document


def _json_items(piece: Piece, options: ReadOptions) -> Iterator[Any]:
    """The items of a top-level list one at a time: the file is never in memory as a whole. Or the one record there
    is."""
    decoder, text, blocks = json.JSONDecoder(), "", _blocks(piece)
    inside, ended = False, False
    while not ended:
        offset_block = next(blocks, None)
        ended = offset_block is None
        if offset_block is not None:
            text += _decode(offset_block[1], piece, offset_block[0], options)
        if not inside and text.lstrip()[:1] == "[":
            inside, text = True, text.lstrip()[1:]
        while inside or ended:
            text = text.lstrip(" \t\r\n,")
            if not text or (inside and text[0] == "]"):
                break
            try:
                item, stop = decoder.raw_decode(text)
            except ValueError as error:
                if ended:
                    raise UserError(f"{piece.path}: broken JSON ({error})") from error
                break
            if stop == len(text) and not ended:  # a number may go on in the next block
                break
            yield item
            text = text[stop:]
    if inside and not text.startswith("]"):
        raise UserError(f"{piece.path}: broken JSON (the list has no end; is the file cut off?)")


def _csv(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)
    with _open(piece, 0) as file:
        header = file.readline()
        names = next(csv.reader([_decode(header, piece, 0, options)]), [])
    column = _column(names, piece.path, options)
    lines = (_decode(line, piece, offset, options) for offset, line in _lines(piece, options) if offset > 0)
    rows = csv.reader(lines, strict=True)
    try:
        for row in rows:
            if row:
                if len(row) <= column:
                    raise UserError(f"{piece.path}: record {rows.line_num} has {len(row)} columns of {len(names)}")
                yield row[column]
    except csv.Error as error:
        raise UserError(f"{piece.path}: broken CSV near record {rows.line_num} ({error})") from error


# Tables --------------------------------------------------------------------------------------------------------------


def _parquet(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with pq.ParquetFile(piece.path) as file:
            names = file.schema_arrow.names
            column = names[_column(names, piece.path, options)]
            groups = list(range(piece.start, piece.stop))
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column]):
                yield from _of_column(batch.column(0), f"{piece.path}, column {column!r}")
    except (ArrowException, OSError) as error:
        raise UserError(f"{piece.path}: not a readable parquet file, perhaps cut off ({error})") from error


def _arrow(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    import pyarrow as pa

    try:
        with pa.OSFile(piece.path) as stream:
            stream.seek(8 if stream.read(6) == b"ARROW1" else 0)
            schema = pa.ipc.read_schema(pa.ipc.read_message(stream))
            column = _column(schema.names, piece.path, options)
            where = f"{piece.path}, column {schema.names[column]!r}"
            stream.seek(piece.start)
            while stream.tell() < piece.stop:
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(stream), schema)
                for row in range(0, batch.num_rows, ROWS):
                    yield from _of_column(batch.column(column).slice(row, ROWS), where)
    except (pa.ArrowException, EOFError, OSError) as error:
        raise UserError(f"{piece.path}: not a readable arrow file, perhaps cut off ({error})") from error


def _schema_bytes(path: str) -> int:
    import pyarrow as pa

    with pa.OSFile(path) as stream:
        return skip_to_batches(stream)


def _of_column(values: Any, where: str) -> Iterator[Document]:
    for value in values.to_pylist():
        if value is not None:
            yield _document(value, lambda: where)


def _of_record(record: Any, where: Callable[[], str], options: ReadOptions) -> Document | None:
    if isinstance(record, dict):
        names = list(record)
        record = record[names[_column(names, where(), options)]]
    return None if record is None else _document(record, where)


def _document(value: Any, where: Callable[[], str]) -> Document:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return np.array(value, np.int64)
    raise UserError(
        f"{where()}: neither text nor a list of token ids, but {type(value).__name__} ({str(value)[:40]!r})"
    )


def _column(names: list[str], where: str, options: ReadOptions) -> int:
    """Index of the text column; of ``input_ids``, data tokenized elsewhere, where there is no text."""
    for wanted in (options.text_column, "input_ids"):
        if wanted in names:
            return names.index(wanted)
    raise UserError(
        f"{where}: no column {options.text_column!r} (dataset.text_column); "
        f"the columns there: {', '.join(names) or 'none'}"
    )


# Bytes ---------------------------------------------------------------------------------------------------------------


def _plain(piece: Piece) -> bool:
    return not piece.format.endswith((".gz", ".zst"))


def _open(piece: Piece, start: int | None = None) -> IO[bytes]:
    file = open(piece.path, "rb")  # noqa: SIM115 (the caller closes it)
    if piece.format.endswith(".gz"):
        return io.BufferedReader(_Named(gzip.open(file), piece.path), 1 << 20)
    if piece.format.endswith(".zst"):
        import zstandard

        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return io.BufferedReader(_Named(stream, piece.path), 1 << 20)
    file.seek(piece.start if start is None else start)
    return file


class _Named(io.RawIOBase):
    """A decompressing stream whose errors are the user's to mend: they name the file."""

    def __init__(self, stream: Any, path: str) -> None:
        import zstandard

        self.stream, self.path = stream, path
        self.broken = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self.stream.read(len(buffer))
        except self.broken as error:
            raise UserError(f"{self.path}: cannot be decompressed, perhaps cut off ({error})") from error
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self.stream.close()
        super().close()


def _decode(raw: bytes, piece: Piece, offset: int, options: ReadOptions) -> str:
    try:
        text = raw.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{piece.path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); "
            "convert the file, or dataset.errors=replace to go on"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _at_line(piece: Piece, offset: int) -> str:
    """``file:line``, counted only for an error message: pieces start anywhere in a file."""
    with _open(piece, 0) as file:
        number, left = 1, offset
        while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
            number += block.count(b"\n")
            left -= len(block)
    return f"{piece.path}:{number}"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


READERS: dict[str, Callable[[Piece, ReadOptions], Iterator[Document]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "docstrings": lambda piece, options: docstrings(_whole_text(piece, options), options.max_document_chars),
    "description": lambda piece, options: package_description(_whole_text(piece, options), options.max_document_chars),
    "topics": lambda piece, options: topics(_whole_text(piece, options)),
}
