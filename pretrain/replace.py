"""A file that is rewritten whole: a reader, and whoever comes after a crash, finds the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, text: str, *, flush: bool = False) -> None:
    """Write ``text`` beside ``path`` and put it in its place. ``flush``: on disk first (fsync), to survive a power cut too.

    Raises ``OSError`` where it can't be written; then ``path`` is as it was.
    """
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
