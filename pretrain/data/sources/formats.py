"""The format of a file by its extension, and which files of a folder are read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable

from pretrain.data.reading.token_files import RAW_TYPES, TOKEN_FORMATS, beside, token_format
from pretrain.data.reading.units import kind_of
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


def local_format(path: str, token_dtype: str | None = None, *, matched: bool = False) -> str | None:
    """Return the format of a file on this machine; ``None`` if it is unknown. A file of tokens is known by what is beside it.

    An array of numpy may be anything, so it is read only where it is named or ``matched``, as is a ``.ds`` without an index. With
    ``token_dtype``, other ``.bin`` files, and files that a pattern ``matched``, hold tokens of this type.
    """
    if form := format_of(path):
        return form
    is_certain = not path.endswith(".npy") and (not path.endswith(".ds") or os.path.exists(beside(path)[1]))
    if (is_certain or matched or token_dtype) and (form := token_format(path)):
        return form
    return f"tokens.{token_dtype}" if token_dtype and (matched or path.endswith(".bin")) else None


def named_format(path: str, token_dtype: str | None = None) -> str:
    """Return the format of a file that was named. Raises ``UserError`` for a file that can't be read without a key."""
    if form := local_format(path, token_dtype, matched=True):
        return form
    if path.endswith(".bin"):
        raise UserError(
            f"{path}: no index (.idx of Megatron-LM) beside it; token ids without one are read with dataset.format=tokens "
            f"dataset.token_dtype={'|'.join(RAW_TYPES)}"
        )
    return "text"


def with_formats(
    names: list[str], place: str, pattern: str | None, form: Callable[[str], str | None] = format_of
) -> dict[str, str]:
    """Return the files of a folder that are read, each with its format: those of a known one, or all that match ``pattern``.

    ``form`` returns the format of a file. Raises ``UserError`` when there are none.
    """
    known = {name: kind for name in names if (kind := form(name) or (pattern and "text"))}
    if known:
        belonging = {other for name, kind in known.items() if kind_of(kind) in TOKEN_FORMATS for other in beside(name)}
        if left_out := [name for name in names if name not in known and name not in belonging]:
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
        f"dataset.pattern (such as '*.py') only {' '.join(FORMATS)} are read, and token ids in .bin with .idx and .ds "
        "with .ds.index (.npy with dataset.pattern='*.npy')"
    )


def _endings(names: Iterable[str]) -> str:
    """Return the most frequent file extensions with their counts, for messages."""
    counts = Counter(os.path.splitext(name)[1] or "no ending" for name in names)
    return ", ".join(f"{count} × {ending}" for ending, count in counts.most_common(5))
