"""The units of tokenization. A *piece* (``FileRange``) is a byte range, or a range of row groups or record batches, of one file.
A *unit* (``WorkUnit``) is one large piece or several small files. Units depend on the files only and not on the number of
workers, so every run makes the same parts. One new file among thousands changes one unit and not all units after it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from pretrain.runtime.errors import UserError

UNIT_BYTES = 8 << 20  # text of one unit: some seconds of work for one core and some megabytes of memory
OWN_UNIT_BYTES = 1 << 20  # a piece of at least this size is not grouped with others


def key_of(*values: Any) -> str:
    """Return a hash of ``values`` (JSON-serialisable), which is the same in every process and on every machine."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode())


# Size, mtime_ns, inode; of a remote file size, 0, hash of its ETag. With an unchanged stamp the bytes are taken to be the same.
Stamp = tuple[int, int, int]


ADDED = ("where", "text_template")  # settings that came later: where they are not set, they are not in a key


@dataclass(frozen=True)
class ReadOptions:
    """The settings that determine which documents are read from files. They change the tokens, so they are included in the key of
    a part."""

    text_column: str = "text"
    errors: str = "strict"
    max_document_chars: int = 20_000
    where: str | None = None
    text_template: str | None = None
    eot: int | None = None  # ends documents of token ids; not part of `key`, because the key of a part has it already

    def key(self) -> dict[str, Any]:
        """Return the settings for a key. Without ``where`` and ``text_template``, keys are those of versions that had neither."""
        known = {name: value for name, value in asdict(self).items() if name != "eot"}
        return {name: value for name, value in known.items() if name not in ADDED or value is not None}

    def values(self) -> list[Any]:
        """Return the settings of `key` as a list, in which each of ``ADDED`` has its name."""
        return [[name, value] if name in ADDED else value for name, value in self.key().items()]

    def text_columns(self) -> tuple[str, ...]:
        """Return the columns whose values make the text of a document."""
        from pretrain.data.reading.template import template_columns

        return (self.text_column,) if self.text_template is None else template_columns(self.text_template)

    def where_columns(self) -> tuple[tuple[str, ...], ...]:
        """Return the columns, with the path of a field below them, that ``where`` names."""
        from pretrain.data.reading.condition import parsed

        return () if self.where is None else parsed(self.where).paths

    @property
    def by_rows(self) -> bool:
        """Whether a document depends on more than the text column of its row."""
        return self.where is not None or self.text_template is not None


def kind_of(form: str) -> str:
    """Return the key of ``readers.READERS`` of a file's format."""
    return form.partition("@")[0].partition(".")[0]


@dataclass(frozen=True)
class SourceFile:
    """A file and its format: a key of ``readers.READERS``, followed by ``.gz`` or ``.zst`` if the file is compressed.

    Attributes:
        path: the file, or its URL.
        format: its format.
        stamp: its stamp, if the listing has it; ``None``: it is read where it is needed.
    """

    path: str
    format: str
    stamp: Stamp | None = None


@dataclass(frozen=True)
class FileRange:
    """A piece of a file.

    Attributes:
        path: the file.
        format: format of the file, as in ``SourceFile``.
        start: first byte, or first row group of a parquet file.
        stop: end (exclusive), in the same unit.
        size: approximate amount of text in bytes.
        stamp: stamp of the file when it was cut.
        digest: hash of the piece's content; ``None`` while it is unknown.
    """

    path: str
    format: str
    start: int
    stop: int
    size: int
    stamp: Stamp
    digest: str | None = None


@dataclass(frozen=True)
class WorkUnit:
    """The pieces that are tokenized together into one part."""

    pieces: tuple[FileRange, ...]

    @property
    def size(self) -> int:
        """The approximate amount of text in bytes."""
        return sum(piece.size for piece in self.pieces)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Convert an ``OSError`` raised while reading a user's file into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def printable(name: str) -> str:
    """Return a file's name for messages and records. Python represents bytes of a name that are not UTF-8 as lone surrogates,
    which can't be encoded; they are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def group(pieces: Iterable[FileRange]) -> Iterator[WorkUnit]:
    """Group pieces into units; small neighbouring pieces share a unit. Until a unit is full, it may end only after a file whose
    name has a certain hash, so a new file changes only the groups near it (content-defined chunking)."""
    waiting: list[FileRange] = []
    waiting_bytes = 0
    for piece in pieces:
        alone = piece.size >= OWN_UNIT_BYTES
        if alone and waiting:
            yield WorkUnit(tuple(waiting))
            waiting, waiting_bytes = [], 0
        waiting.append(piece)
        waiting_bytes += piece.size
        may_end = (
            waiting_bytes >= UNIT_BYTES // 4
            and xxhash.xxh3_64_intdigest(os.path.basename(piece.path).encode("utf-8", "surrogateescape")) % 8 == 0
        )
        if alone or may_end or waiting_bytes >= UNIT_BYTES:
            yield WorkUnit(tuple(waiting))
            waiting, waiting_bytes = [], 0
    if waiting:
        yield WorkUnit(tuple(waiting))
