"""JSON files that a program has written, read so that every damage is a ``ValueError`` and nothing is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a regular file. Raises ``OSError`` where it can't be read, ``ValueError`` for anything but one JSON
    value without duplicate keys: Python's own parser keeps the last of them without a word."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path} is missing")
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """Like ``read_json``, of a text."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in found if names.count(n) > 1)!r} comes twice")
    return found
