"""Token shards: one file with the tokens of one work unit, written once and read through a memory map. A shard is also called
a part of its store.

The tokens of a corpus that another program tokenized stay in its own file: their shard has none, and its footer names the file.

Layout: the tokens (uint16 or uint32), padding to 8 bytes, then five columns with one value per document: int64 end
(exclusive, in tokens), uint64 hash, int64 bytes of text, uint32 number of the piece within the unit, and uint32 index of the
document within that piece; then a JSON footer with a checksum of all bytes before it, the length of the footer as uint64, and the
magic.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.reading.opening import stamp_of
from pretrain.data.reading.units import Stamp
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.filesystem import mapped, read_at
from pretrain.runtime.open_files import OpenFile

MAGIC = b"PTTOKEN1"
DTYPES = ("uint16", "uint32")
DTYPES_ELSEWHERE = (*DTYPES, "uint8", "int8", "int16", "int32", "int64", "uint64")
UNKNOWN_SIZE = -1  # bytes of text of a document that was never text here
CHECKED_BYTES = 1 << 20  # read at a time
MAX_OPEN = 256  # each memory map holds a file descriptor; 1024 is the usual limit
COLUMNS = (("ends", "<i8"), ("hashes", "<u8"), ("sizes", "<i8"), ("pieces", "<u4"), ("indices", "<u4"))


class PartWriter:
    """A writer of one shard. Tokens are written to the file immediately; only the columns are held in memory until the end."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any]) -> None:
        self.file, self.dtype, self.num_tokens, self.num_bytes, self.num_removed = file, dtype, 0, 0, 0
        self.columns = {name: array({"<i8": "q", "<u8": "Q", "<u4": "I"}[kind]) for name, kind in COLUMNS}
        self._checksum = xxhash.xxh3_64()

    def append(self, tokens: NDArray[Any], *, digest: int, size: int, piece: int, index: int) -> None:
        """Write one document.

        Args:
            tokens: the tokens of the document, including its end-of-text token.
            digest: hash of the text.
            size: bytes of the text.
            piece: number of the document's piece within the unit.
            index: number of the document within that piece.
        """
        self._write(tokens.astype(self.dtype, copy=False).tobytes())
        self.refer(len(tokens), digest=digest, size=size, piece=piece, index=index)

    def refer(self, length: int, *, digest: int, size: int, piece: int, index: int) -> None:
        """Add a document whose ``length`` tokens are not written here."""
        self.num_tokens += length
        self.num_bytes += max(size, 0)
        for name, value in zip(self.columns, (self.num_tokens, digest, size, piece, index), strict=True):
            self.columns[name].append(value)

    def skip(self) -> None:
        """Count a document that is not written, because ``dataset.where`` removes it."""
        self.num_removed += 1

    def finish(self, facts: dict[str, Any]) -> None:
        """Write padding, columns and footer. ``facts`` are further entries of the footer."""
        if "tokens_at" not in facts:
            self._write(bytes(-self.num_tokens * self.dtype.itemsize % 8))
        for column in self.columns.values():
            self._write(column.tobytes())
        footer = {
            "dtype": self.dtype.name,
            "tokens": self.num_tokens,
            "documents": len(self.columns["ends"]),
            "bytes": self.num_bytes,
            "checksum": self._checksum.hexdigest(),
            **facts,
        }
        raw = json.dumps(footer, sort_keys=True).encode()
        self.file.write(raw + struct.pack("<Q", len(raw)) + MAGIC)

    def _write(self, raw: bytes) -> None:
        self.file.write(raw)
        self._checksum.update(raw)


@dataclass(frozen=True)
class TokenShard:
    """The content of a shard's footer. The arrays are views of a memory map; per document they hold ``ends`` (exclusive, in
    tokens), ``hashes``, ``sizes`` (bytes of text), ``pieces`` and ``indices``. ``tokens_at`` is the file that has the tokens, the
    offset of the first one there, and the stamp of the file; ``None`` if they are in the shard itself."""

    path: Path
    dtype: np.dtype[Any]
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_removed: int = 0  # documents that ``dataset.where`` removed
    checksum: str | None = None  # of all bytes before the footer; shards of earlier versions have none
    tokens_at: tuple[str, int, Stamp] | None = None

    @property
    def tokens(self) -> NDArray[Any] | TokensElsewhere:
        return _tokens_elsewhere(self) if self.tokens_at else _mapped(self)[0]

    @property
    def ends(self) -> NDArray[np.int64]:
        return _mapped(self)[1]

    @property
    def hashes(self) -> NDArray[np.uint64]:
        return _mapped(self)[2]

    @property
    def sizes(self) -> NDArray[np.int64]:
        return _mapped(self)[3]

    @property
    def pieces(self) -> NDArray[np.uint32]:
        return _mapped(self)[4]

    @property
    def indices(self) -> NDArray[np.uint32]:
        return _mapped(self)[5]


def write_first(part: TokenShard, documents: int, file: IO[bytes], facts: dict[str, Any]) -> None:
    """Write a shard with the first ``documents`` of ``part``. ``facts`` are further entries of its footer."""
    writer, start = PartWriter(file, part.dtype), 0
    for end, digest, size, piece, index in zip(
        *(column[:documents].tolist() for column in (part.ends, part.hashes, part.sizes, part.pieces, part.indices)),
        strict=True,
    ):
        if part.tokens_at:
            writer.refer(end - start, digest=digest, size=size, piece=piece, index=index)
        else:
            writer.append(part.tokens[start:end], digest=digest, size=size, piece=piece, index=index)
        start = end
    elsewhere = {"tokens_at": [*part.tokens_at[:2], *part.tokens_at[2]]} if part.tokens_at else {}
    removed = {"removed": part.num_removed} if part.num_removed else {}
    writer.finish(facts | elsewhere | removed)


def open_part(path: Path, *, alone: bool = False) -> TokenShard | None:
    """Return the shard at ``path``; ``None`` when the file does not exist or is incomplete (a disk may lose its last writes), or
    the file that has its tokens was changed or moved, which is not checked with ``alone``."""
    try:
        with open(path, "rb") as file:
            total = file.seek(0, os.SEEK_END)
            file.seek(max(total - 16, 0))
            tail = file.read()
            if tail[8:] != MAGIC:
                return None
            length = struct.unpack("<Q", tail[:8])[0]
            if length > total - 16:
                return None
            file.seek(total - 16 - length)
            footer = json.loads(file.read(length))
        counts = [footer[name] for name in ("tokens", "documents", "bytes")]
        removed = footer.get("removed", 0)
        elsewhere = footer.get("tokens_at")
        known = DTYPES if elsewhere is None else DTYPES_ELSEWHERE
        if footer["dtype"] not in known or not all(type(count) is int and count >= 0 for count in (*counts, removed)):
            return None
        tokens_at = None
        if elsewhere is not None:
            path_elsewhere, offset, size, changed, inode = elsewhere
            tokens_at = (str(path_elsewhere), int(offset), (int(size), int(changed), int(inode)))
            if not alone and stamp_of(tokens_at[0]) != tokens_at[2]:
                return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    tokens, documents, size = counts
    checksum = footer.get("checksum")
    part = TokenShard(path, np.dtype(footer["dtype"]), tokens, documents, size, removed, checksum, tokens_at)
    return part if _column_starts(part)[-1] + length + 16 == total else None


def is_intact(path: Path) -> bool:
    """Return whether the shard at ``path`` is complete and has its checksum, if it has one. All of its bytes are read, but not
    tokens in another file. Raises ``OSError``."""
    if (part := open_part(path, alone=True)) is None:
        return False
    if part.checksum is None:
        return True
    found, left = xxhash.xxh3_64(), _column_starts(part)[-1]
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, CHECKED_BYTES))):
            found.update(block)
            left -= len(block)
    return not left and found.hexdigest() == part.checksum


def _column_starts(part: TokenShard) -> list[int]:
    """Return the byte offset of each column, followed by that of the footer."""
    start = 0 if part.tokens_at else -(-part.num_tokens * part.dtype.itemsize // 8) * 8
    starts = [start]
    for _, kind in COLUMNS:
        start += part.num_documents * np.dtype(kind).itemsize
        starts.append(start)
    return starts


@lru_cache(maxsize=MAX_OPEN)
def _mapped(part: TokenShard) -> tuple[NDArray[Any], ...]:
    """Map the file and return the tokens and the columns. Raises ``UserError`` if the file was deleted or truncated."""
    starts = _column_starts(part)
    try:
        raw = mapped(Path(part.path))  # a plain array, because slicing a memmap takes ten times as long
    except (OSError, ValueError):  # the file is missing or empty
        raw = np.empty(0, np.uint8)
    if len(raw) < starts[-1]:
        raise UserError(
            f"{part.path} has disappeared from the token cache during the run; the same command creates it again and resumes"
        )
    columns = [raw[start:stop].view(kind) for (_, kind), start, stop in zip(COLUMNS, starts, starts[1:], strict=False)]
    return raw[: starts[0]][: 0 if part.tokens_at else part.num_tokens * part.dtype.itemsize].view(part.dtype), *columns


class TokensElsewhere:
    """The tokens of a shard in the file of another program, read at each access. The file is kept open and is not mapped.

    The owner of the file may write to it. A file that was replaced is still the one that is open here; one that was written to or
    truncated is found by its stamp after each access, so that no token of another text is trained on.
    """

    def __init__(self, part: TokenShard) -> None:
        assert part.tokens_at is not None
        self._path, self._start, stamp = part.tokens_at
        self._dtype, self._count, self._changed = part.dtype, part.num_tokens, stamp[:2]
        try:
            self._file = _opened(self._path, stamp)
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror}; the run reads its tokens in place") from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: slice) -> NDArray[Any]:
        """Return the tokens of a slice without a step. Raises ``UserError`` if the file was changed."""
        first, last, _ = key.indices(self._count)
        size = self._dtype.itemsize
        try:
            found = read_at(self._file.number, self._start + first * size, max(last - first, 0) * size)
        except (OSError, EOFError) as error:
            raise _changed(self._path, one_line(error)) from error
        self._check()
        return found.view(self._dtype)

    def _check(self) -> None:
        if self._file.stamp[:2] != self._changed:
            raise _changed(self._path, "the file was written to")


def _changed(path: str, reason: str) -> UserError:
    return UserError(
        f"{path}: changed or cut off during the run, which reads its tokens in place ({reason}); restore the file, and the same "
        "command resumes from the last checkpoint"
    )


@lru_cache(maxsize=MAX_OPEN)
def _opened(path: str, stamp: Stamp) -> OpenFile:
    """Open a file once for all of its shards. Raises ``OSError``, and ``UserError`` if it is not the one with this stamp."""
    file = OpenFile(path)
    if file.stamp != stamp:
        raise _changed(path, "another file, or another content, is there")
    return file


@lru_cache(maxsize=MAX_OPEN)
def _tokens_elsewhere(part: TokenShard) -> TokensElsewhere:
    return TokensElsewhere(part)
