"""What is tokenized at a time. A *piece* is a byte range (or row groups, or record batches) of one file; a *unit* is
one large piece or several small files. The cut depends on the files alone, never on the number of workers, so that
every run makes the same parts; and one new file among thousands changes one unit, not all that follow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from pretrain.runtime.errors import UserError

UNIT_BYTES = 8 << 20  # text of one unit: some seconds of one core's work, some megabytes of memory
OWN_UNIT_BYTES = 1 << 20  # a piece of at least this size is not grouped with others


def key_of(*values: Any) -> str:
    """A name for ``values`` (fit for JSON), the same in every process and on every machine."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values).encode())


Stamp = tuple[int, int, int]  # size, mtime_ns, inode: unchanged means the same bytes


@dataclass(frozen=True)
class ReadOptions:
    """How documents come out of files; every one of these changes the tokens, so they are part of a part's key."""

    text_column: str = "text"
    errors: str = "strict"
    max_document_chars: int = 20_000


@dataclass(frozen=True)
class SourceFile:
    """A file and the name of its format, a key of ``readers.READERS``, with ``.gz`` or ``.zst`` behind it if
    compressed."""

    path: str
    format: str


@dataclass(frozen=True)
class FileRange:
    """``start`` and ``stop`` are bytes, for parquet row groups; ``size`` is about its text in bytes."""

    path: str
    format: str
    start: int
    stop: int
    size: int
    stamp: Stamp
    digest: str | None = None


@dataclass(frozen=True)
class WorkUnit:
    pieces: tuple[FileRange, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def stamp_of(path: str | Path) -> Stamp:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What the file system says about a file of the user's, in the user's words."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def printable(name: str) -> str:
    """A file's name for messages and records. Where its bytes are not UTF-8, Python has halves of surrogate pairs for them,
    which can be written nowhere."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def group(pieces: Iterable[FileRange]) -> list[WorkUnit]:
    """Small neighbours share a unit. A unit may end only at a file whose *name* says so, until it is full: then a
    new file shifts the groups near it and no others (content-defined chunking)."""
    units: list[WorkUnit] = []
    waiting: list[FileRange] = []
    waiting_bytes = 0
    for piece in pieces:
        alone = piece.size >= OWN_UNIT_BYTES
        if alone and waiting:
            units.append(WorkUnit(tuple(waiting)))
            waiting, waiting_bytes = [], 0
        waiting.append(piece)
        waiting_bytes += piece.size
        may_end = (
            waiting_bytes >= UNIT_BYTES // 4
            and xxhash.xxh3_64_intdigest(os.path.basename(piece.path).encode("utf-8", "surrogateescape")) % 8 == 0
        )
        if alone or may_end or waiting_bytes >= UNIT_BYTES:
            units.append(WorkUnit(tuple(waiting)))
            waiting, waiting_bytes = [], 0
    return [*units, WorkUnit(tuple(waiting))] if waiting else units
