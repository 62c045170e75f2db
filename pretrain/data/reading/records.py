"""The parts that all readers share: decoding bytes, extracting the document of a record, and describing a place in a file for
error messages. A place is computed only when a message needs it, because lines are counted from the beginning of the file."""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.reading.compressed import is_compressed, open_bytes
from pretrain.data.reading.template import filled
from pretrain.data.reading.units import FileRange, ReadOptions
from pretrain.runtime.errors import UserError

Document = str | NDArray[np.int64]
Location = Callable[[], str]
BLOCK_BYTES = 8 << 20
MOST_COLUMNS = 50  # that a message names
LONGEST_CHARACTER = 4  # bytes of UTF-8
# https://www.unicode.org/faq/utf_bom.html#bom4. UTF-32 comes first, because its mark begins with that of UTF-16.
OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# First bytes of compressed files and archives. They are detected under any file name; with ``errors=replace`` they would
# otherwise be read as text.
PACKED = (
    (re.compile(rb"\x1f\x8b\x08"), "compressed by gzip: call it .gz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "compressed by zstd: call it .zst"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "compressed by bzip2: decompress it, or compress it by zstd"),
    (re.compile(rb"\xfd7zXZ\x00"), "compressed by xz: decompress it, or compress it by zstd"),
    (re.compile(rb"PK\x03\x04"), "a zip archive: unpack it"),
    (re.compile(rb"(?s).{257}ustar"), "a tar archive: unpack it"),
)
SURROGATE = re.compile("[\ud800-\udfff]")


def lines(piece: FileRange) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) for each line that begins in the piece."""
    with open_bytes(piece) as file:
        offset, stop = piece.start, None if is_compressed(piece) else piece.stop
        while (stop is None or offset < stop) and (line := file.readline()):
            yield offset, line
            offset += len(line)


def blocks(piece: FileRange) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) in blocks of about ``BLOCK_BYTES``. A block ends at a line end if there is one, and never inside a
    character."""
    with open_bytes(piece) as file:
        offset = piece.start
        left = 1 << 62 if is_compressed(piece) else piece.stop - piece.start
        while block := file.read(min(BLOCK_BYTES, left)):
            if len(block) == BLOCK_BYTES:
                block += file.readline(min(BLOCK_BYTES, left - len(block)))
                block += _rest_of_character(file, block, left - len(block))
            yield offset, block
            offset, left = offset + len(block), left - len(block)


def _rest_of_character(file: Any, block: bytes, left: int) -> bytes:
    """Read and return the bytes that complete a UTF-8 character at the end of ``block``."""
    remainder = b""
    while len(remainder) < min(LONGEST_CHARACTER - 1, left) and not block.endswith(b"\n"):
        if not 0x80 <= (file.peek(1)[:1] or b"\0")[0] < 0xC0:  # not the continuation of a character
            break
        remainder += file.read(1)
    return remainder


def decode(raw: bytes, piece: FileRange, offset: int, options: ReadOptions) -> str:
    """Return the text of ``raw``, which begins at ``offset`` of the (decompressed) file, without a UTF-8 byte order mark.

    Raises:
        UserError: ``raw`` is not UTF-8. UTF-16 and UTF-32 are refused with ``errors=replace`` too, because hardly any text would
            be left.
    """
    if offset == 0:
        _check_beginning(raw, piece.path)
    try:
        text = raw.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        inside = " of the decompressed file" if is_compressed(piece) else ""
        raise _not_utf8(piece.path, offset + error.start, inside, raw[error.start]) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def decode_value(raw: bytes, place: Location, options: ReadOptions) -> str:
    """Return the text of a table's value, given as bytes."""
    try:
        return raw.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise _not_utf8(place(), error.start, " of the text", raw[error.start]) from error


def _not_utf8(where: str, at: int, inside: str, byte: int) -> UserError:
    return UserError(
        f"{where}: not UTF-8 at byte {at}{inside} (0x{byte:02x}); convert the file, or read it with dataset.errors=replace"
    )


def _check_beginning(raw: bytes, path: str) -> None:
    for begins, what in PACKED:
        if begins.match(raw):
            raise UserError(f"{path}: not text, but {what}")
    if encoding := _other_encoding(raw):
        raise UserError(f"{path}: {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8")


def _other_encoding(raw: bytes) -> str | None:
    """The encoding by its byte order mark; without one, UTF-16 by every other byte of mostly Latin text being 0."""
    for mark, name in OTHER_MARKS.items():
        if raw.startswith(mark):
            return name
    even, odd = raw[:4096:2], raw[1:4096:2]
    for zeros, others, name in ((even, odd, "UTF-16BE"), (odd, even, "UTF-16LE")):
        if zeros.count(0) > 0.8 * len(zeros) > 1 and not others.count(0):
            return name
    return None


def line_at(piece: FileRange, offset: int) -> str:
    """Return ``file:line`` of the byte ``offset``. It reads the file up to there, so it is used for messages only."""
    with open_bytes(piece, 0) as file:
        number, left = 1, offset
        while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
            number += block.count(b"\n")
            left -= len(block)
    return f"{piece.path}:{number}"


def document_of_record(record: Any, place: Location, options: ReadOptions) -> Document | None:
    """Return the document of a JSON value: the text column of an object, or the value itself. Return ``None`` for null."""
    if options.text_template is not None:
        return document_of_template(record, place, options)
    if isinstance(record, dict):
        names = list(record)
        record = record[names[column_index(names, place, options)]]
    return None if record is None else document_of(record, place, options)


def document_of(value: Any, place: Location, options: ReadOptions) -> Document:
    """Return ``value`` as a document. Raises ``UserError`` if it is neither text nor a list of token ids, or if UTF-8 can't
    represent the text."""
    if isinstance(value, str):
        return value if value.isascii() else _without_surrogates(value, place, options)
    if isinstance(value, list) and all(type(token) is int for token in value):
        try:
            return np.array(value, np.int64)
        except OverflowError as error:
            largest = max(value, key=abs)
            raise UserError(f"{place()}: {str(largest)[:40]} is not a token id") from error
    raise UserError(
        f"{place()}: neither text nor a list of token ids, but {type(value).__name__} ({reprlib.repr(value)})"
    )


def document_of_template(row: Any, place: Location, options: ReadOptions) -> str | None:
    """Return the text that ``text_template`` makes of a row; ``None`` if none of its columns has a value. Raises ``UserError`` if
    a column is missing or is neither text nor a number."""
    names = list(row) if isinstance(row, dict) else []
    values: dict[str, Any] = {}
    for name in options.text_columns():
        if name not in names:
            raise _no_column(name, "text_template", names, place)
        value = row[name]
        if value is not None and not isinstance(value, str | int | float):
            raise UserError(
                f"{place()}: column {name!r} (dataset.text_template) is neither text nor a number, but "
                f"{type(value).__name__} ({reprlib.repr(value)})"
            )
        values[name] = _without_surrogates(value, place, options) if isinstance(value, str) else value
    assert options.text_template is not None
    return filled(options.text_template, values)


def _without_surrogates(text: str, place: Location, options: ReadOptions) -> str:
    """Replace lone surrogates in ``text``, or raise ``UserError``. JSON can escape half of a surrogate pair, which is not a
    character and can't be encoded in UTF-8."""
    if not (found := SURROGATE.search(text)):
        return text
    if options.errors == "replace":
        return SURROGATE.sub("\ufffd", text)
    raise UserError(
        f"{place()}: half of a surrogate pair (\\u{ord(found[0]):04x}) at character {found.start()} of the text, which is not a "
        "character; correct the file, or read it with dataset.errors=replace"
    )


def column_index(names: list[str], place: Location, options: ReadOptions, column: str | None = None) -> int:
    """Return the index of ``column``, by default the text column, or that of ``input_ids`` (data tokenized elsewhere) if there is
    no text column."""
    is_template = options.text_template is not None
    wanted = (column or "",) if is_template else (options.text_column, "input_ids")
    for name in wanted:
        if name in names:
            return names.index(name)
    raise _no_column(wanted[0], "text_template" if is_template else "text_column", names, place)


def _no_column(name: str, key: str, names: Sequence[str], place: Location) -> UserError:
    return UserError(f"{place()}: no column {name!r} (dataset.{key}); the columns there: {shown_columns(names)}")


def shown_columns(names: Iterable[str]) -> str:
    """Return names of columns, which may be any text, for a message of one line."""
    first = [name if name.isprintable() else repr(name) for name in map(str, itertools.islice(names, MOST_COLUMNS + 1))]
    return ", ".join([*first[:MOST_COLUMNS], *(["…"] if len(first) > MOST_COLUMNS else [])]) or "none"
