"""The record of a dataset's files: their pieces with stamps and hashes, so that the next start opens no source file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.data.cache import ensure_content
from pretrain.data.reading.units import FileRange, WorkUnit, key_of

YOUNG_SECONDS = 0.05  # a file modified this shortly before it was read could change again without a new mtime


def recall(memory: Path) -> dict[str, list[FileRange]]:
    """Return what ``remember`` wrote. If the file is missing or damaged, return an empty dict; then all files are read again."""
    known: dict[str, list[FileRange]] = {}
    try:
        checksum, rows = json.loads(memory.read_text())
        if checksum != key_of(rows):
            return {}
        for path, kind, start, stop, size, stamp, digest in rows:
            known.setdefault(path, []).append(FileRange(path, kind, start, stop, size, tuple(stamp), digest))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return known


def remember(
    memory: Path, units: Iterable[WorkUnit], digests: Iterable[Sequence[str | None]], started_at: float
) -> None:
    """Write the pieces with their digests. Those of files modified so recently that they may still change without a new mtime are
    written without a digest and are read again."""
    pieces = []
    for unit, of_unit in zip(units, digests, strict=True):
        for piece, digest in zip(unit.pieces, of_unit, strict=True):
            known = None if is_young(piece, started_at) else digest
            pieces.append(piece if piece.digest == known else replace(piece, digest=known))
    rows = [[*vars(piece).values()] for piece in pieces]
    ensure_content(memory, json.dumps([key_of(rows), rows]).encode())


def is_young(piece: FileRange, started_at: float) -> bool:
    """Return whether the piece's file may have changed, without a new stamp, after it was read."""
    return started_at - piece.stamp[1] / 1e9 <= YOUNG_SECONDS
