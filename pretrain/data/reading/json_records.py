"""Documents from JSON Lines and JSON files, one record at a time. Every byte is parsed once, or a few times in a record that
crosses blocks, and memory does not depend on the file's size."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from pretrain.data.reading.records import Document, Location, blocks, decode, line_at, lines
from pretrain.data.reading.rows import documents_of_records
from pretrain.data.reading.units import FileRange, ReadOptions
from pretrain.runtime.errors import UserError

NESTED = "nested too deep"
BETWEEN = re.compile(r"[ \t\r\n,]*")
# Characters. A syntax error this close to the end of the window may be a literal or an escape that is cut off there: it is more
# than "-Infinity" or half of "\ud83d\ude00".
LONGEST_WORD = 16


def jsonl(piece: FileRange, options: ReadOptions) -> Iterator[Document | None]:
    """Yield the document of each line of JSON Lines. Empty lines are skipped."""
    return documents_of_records(_line_records(piece, options), options, piece.path)


def json_values(piece: FileRange, options: ReadOptions) -> Iterator[Document | None]:
    """Yield the documents of a JSON file that holds a list of records, several lists in sequence, or bare records (files named
    .json are often JSON Lines)."""
    return documents_of_records(_value_records(piece, options), options, piece.path)


def _line_records(piece: FileRange, options: ReadOptions) -> Iterator[tuple[Any, Location]]:
    """Yield the value of each line with its place."""
    for offset, raw in lines(piece):
        line = decode(raw, piece, offset, options)
        if not line or line.isspace():
            continue
        place = partial(line_at, piece, offset)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place()}: broken JSON line ({error})") from error
        except RecursionError as error:
            raise UserError(f"{place()}: broken JSON line ({NESTED})") from error
        yield record, place


def _value_records(piece: FileRange, options: ReadOptions) -> Iterator[tuple[Any, Location]]:
    """Yield the values of a JSON file with their places."""
    window = _Window(piece, options)
    inside = False
    for index in itertools.count():
        while (char := window.next_char()) and char == ("]" if inside else "["):
            inside, window.at = not inside, window.at + 1
        if not char:
            break
        record = window.value()
        yield record, window.location(f", record {index}")
    if inside:
        raise UserError(f"{window.place()}: broken JSON (the list has no end; is the file cut off?)")


class _Window:
    """The text of a file that has been read but not parsed yet. ``at`` is the position in ``text`` at which parsing continues."""

    def __init__(self, piece: FileRange, options: ReadOptions) -> None:
        self.text, self.at = "", 0
        self._start = 0  # position of the current record
        self._path, self._line = piece.path, 1  # number of the line on which ``text`` begins
        self._blocks = (decode(raw, piece, offset, options) for offset, raw in blocks(piece))
        self._decode = json.JSONDecoder().raw_decode

    def place(self, more: str = "") -> str:
        """Return ``file:line`` of the current record, followed by ``more``."""
        return f"{self._path}:{self._line + self.text.count(chr(10), 0, self._start)}{more}"

    def location(self, more: str) -> Location:
        """Return the function that describes the place of the current record, also when parsing has continued after it."""
        path, line, text, start = self._path, self._line, self.text, self._start
        return lambda: f"{path}:{line + text.count(chr(10), 0, start)}{more}"

    def next_char(self) -> str:
        """Return the next character that is neither white space nor a comma; an empty string at the end of the file."""
        while True:
            self.at = self._start = BETWEEN.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches always
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def value(self) -> Any:
        """Return the value that begins at ``at``. Raises ``UserError`` with its place if there is no valid value."""
        while True:
            try:
                value, stop = self._decode(self.text, self.at)
            except json.JSONDecodeError as error:
                string = error.msg.startswith("Unterminated string")
                unfinished = string or error.pos > len(self.text) - LONGEST_WORD
                if unfinished and self._read_on():
                    continue
                self._start = min(error.pos, len(self.text))
                cut_off = "; is the file cut off?" if string or error.pos >= len(self.text) else ""
                raise UserError(f"{self.place()}: broken JSON ({error.msg}{cut_off})") from error
            except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
                reason = NESTED if isinstance(error, RecursionError) else error
                raise UserError(f"{self.place()}: broken JSON ({reason})") from error
            if stop == len(self.text) and self._read_on():  # a number may continue in the next block
                continue
            self._start, self.at = self.at, stop
            return value

    def _read_on(self) -> bool:
        """Drop the parsed text and read at least one block, and as much as is left unparsed. Doubling the window bounds the text
        that is parsed for a record to a few times its length. Return False at the end of the file."""
        self._line += self.text.count("\n", 0, self.at)
        parts, wanted = [self.text[self.at :]], len(self.text) - self.at
        while block := next(self._blocks, ""):
            parts.append(block)
            wanted -= len(block)
            if wanted <= 0:
                break
        self.text, self.at, self._start = "".join(parts), 0, 0
        return len(parts) > 1
