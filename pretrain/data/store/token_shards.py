"""A part: the tokens of one unit in one file, written once and read through a memory map.

Layout: tokens (uint16 or uint32), padding to 8 bytes, then per document int64 end (exclusive, in tokens), uint64
hash, int64 bytes of text, uint32 piece of the unit and uint32 index in that piece; then a JSON footer, its length as
uint64, and the magic.
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
from numpy.typing import NDArray

from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import mapped

MAGIC = b"PTTOKEN1"
DTYPES = ("uint16", "uint32")
MAX_OPEN = 256  # each memory map holds a file descriptor; 1024 is the usual limit
COLUMNS = (("ends", "<i8"), ("hashes", "<u8"), ("sizes", "<i8"), ("pieces", "<u4"), ("indices", "<u4"))


class PartWriter:
    """Tokens go to the file as they come; only what is known per document waits in memory."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any]) -> None:
        self.file, self.dtype, self.num_tokens, self.num_bytes = file, dtype, 0, 0
        self.columns = {name: array({"<i8": "q", "<u8": "Q", "<u4": "I"}[kind]) for name, kind in COLUMNS}

    def append(self, tokens: NDArray[Any], *, digest: int, size: int, piece: int, index: int) -> None:
        """One document, its end-of-text token included. ``size``: bytes of its text."""
        self.file.write(tokens.astype(self.dtype, copy=False).data)
        self.num_tokens += len(tokens)
        self.num_bytes += size
        for name, value in zip(self.columns, (self.num_tokens, digest, size, piece, index), strict=True):
            self.columns[name].append(value)

    def finish(self, facts: dict[str, Any]) -> None:
        self.file.write(bytes(-self.num_tokens * self.dtype.itemsize % 8))
        for column in self.columns.values():
            self.file.write(column.tobytes())
        footer = {
            "dtype": self.dtype.name,
            "tokens": self.num_tokens,
            "documents": len(self.columns["ends"]),
            "bytes": self.num_bytes,
            **facts,
        }
        raw = json.dumps(footer, sort_keys=True).encode()
        self.file.write(raw + struct.pack("<Q", len(raw)) + MAGIC)


@dataclass(frozen=True)
class TokenShard:
    """What the footer says; the arrays are views of a memory map."""

    path: Path
    dtype: np.dtype[Any]
    num_tokens: int
    num_documents: int
    num_bytes: int

    @property
    def tokens(self) -> NDArray[Any]:
        return _mapped(self)[0]

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


def open_part(path: Path) -> TokenShard | None:
    """``None`` when there is no such file, or when it is not all there (a disk that lost its last writes)."""
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
        if footer["dtype"] not in DTYPES or not all(type(count) is int and count >= 0 for count in counts):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    part = TokenShard(path, np.dtype(footer["dtype"]), *counts)
    return part if _column_starts(part)[-1] + length + 16 == total else None


def _column_starts(part: TokenShard) -> list[int]:
    start = -(-part.num_tokens * part.dtype.itemsize // 8) * 8
    starts = [start]
    for _, kind in COLUMNS:
        start += part.num_documents * np.dtype(kind).itemsize
        starts.append(start)
    return starts


@lru_cache(maxsize=MAX_OPEN)
def _mapped(part: TokenShard) -> tuple[NDArray[Any], ...]:
    starts = _column_starts(part)
    try:
        raw = mapped(Path(part.path))  # a plain array: slicing a memmap costs ten times as much
    except (OSError, ValueError):  # gone, or empty
        raw = np.empty(0, np.uint8)
    if len(raw) < starts[-1]:
        raise UserError(
            f"the token cache has lost {part.path} under this run; the same command makes it anew and goes on"
        )
    columns = [raw[start:stop].view(kind) for (_, kind), start, stop in zip(COLUMNS, starts, starts[1:], strict=False)]
    return raw[: part.num_tokens * part.dtype.itemsize].view(part.dtype), *columns
