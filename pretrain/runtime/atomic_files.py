"""Atomic rewriting of a file: a reader finds either the old content or the new one, also after a crash."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from pretrain.runtime.filesystem import flush as fsync
from pretrain.runtime.safe_files import open_new


def replace_file(path: Path, text: str, *, flush: bool = False) -> None:
    """Write ``text`` to a temporary file and rename it to ``path``. ``flush`` calls fsync before, to survive a power cut too.

    Raises ``OSError`` if it can't be written; then ``path`` is unchanged.
    """
    partial = partial_of(path)
    try:
        with open_new(partial, mode="w", encoding="utf-8") as file:
            file.write(text)
            if flush:
                file.flush()
                fsync(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def keep_copy(path: Path) -> None:
    """Copy ``path`` to ``<name>.broken`` in its folder, before it is rewritten without its unreadable parts. An existing copy
    is not overwritten."""
    copy = path.with_name(f"{path.name}.broken")
    if not os.path.lexists(copy):
        with suppress(OSError):  # a full disk: saving the readable records matters more
            shutil.copyfile(path, copy)


def partial_of(path: Path, *, process: int | None = None) -> Path:
    """Return the temporary file that a process (default: this one) renames to ``path``. Every process has its own, since
    several may write the same file."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{process or os.getpid()}.partial")
