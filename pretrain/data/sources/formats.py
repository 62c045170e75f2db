"""The format of a file by its extension, and which files of a folder are read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

from pretrain.data.sources.listing import notice_once
from pretrain.runtime.errors import UserError

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIBLE = {"text", "jsonl", "json", "csv"}


def format_of(path: str) -> str | None:
    """Return the format by the file's extension; ``None`` if the extension is unknown."""
    stem, ending = os.path.splitext(path.lower())
    if ending in (".gz", ".zst"):
        inner = FORMATS.get(os.path.splitext(stem)[1])
        return inner + ending if inner in COMPRESSIBLE else None
    return FORMATS.get(ending)


def with_formats(names: list[str], place: str, pattern: str | None) -> dict[str, str]:
    """Return the files of a folder that are read, each with its format: those of a known one, or all that match ``pattern``.

    Raises ``UserError`` when there are none.
    """
    known = {name: kind for name in names if (kind := format_of(name) or (pattern and "text"))}
    if known:
        if left_out := [name for name in names if name not in known]:
            notice_once(
                f"{place}: {len(left_out)} files are not read ({_endings(left_out)}); dataset.pattern chooses them"
            )
        return known
    if pattern:
        raise UserError(f"dataset.pattern={pattern}: no file in {place} matches")
    if not names:
        raise UserError(f"dataset.nameOrPath={place}: the folder is empty")
    raise UserError(
        f"dataset.nameOrPath={place}: no text in the folder; it holds {_endings(names)}, and without "
        f"dataset.pattern (such as '*.py') only {' '.join(FORMATS)} are read"
    )


def _endings(names: Iterable[str]) -> str:
    """Return the most frequent file extensions with their counts, for messages."""
    counts = Counter(os.path.splitext(name)[1] or "no ending" for name in names)
    return ", ".join(f"{count} × {ending}" for ending, count in counts.most_common(5))
