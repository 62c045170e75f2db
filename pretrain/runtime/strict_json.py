"""Strict reading of JSON files that a program has written: any damage is a ``ValueError``, and nothing is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return the content of a regular file. Raises ``OSError`` if it can't be read, and ``ValueError`` for anything but one JSON
    value without duplicate keys, of which Python's own parser would silently keep the last."""
    if not path.is_file():  # reading a pipe would block
        raise FileNotFoundError(f"{path} is missing")
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """Parse a text like ``read_json``."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in found if names.count(n) > 1)!r} is duplicated")
    return found
