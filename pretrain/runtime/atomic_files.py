"""A file that is rewritten whole: a reader, and whoever comes after a crash, finds the old one or the new one."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from pretrain.runtime.filesystem import flush as fsync
from pretrain.runtime.safe_files import open_new


def replace_file(path: Path, text: str, *, flush: bool = False) -> None:
    """Write ``text`` beside ``path`` and put it in its place. ``flush``: on disk first (fsync), to survive a power cut too.

    Raises ``OSError`` where it can't be written; then ``path`` is as it was.
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
    """Keep what is in ``path`` as ``<name>.broken`` beside it, before it is rewritten without what can't be read of it;
    the first such copy stays."""
    copy = path.with_name(f"{path.name}.broken")
    if not os.path.lexists(copy):
        with suppress(OSError):  # no room: the records that can be read are worth more
            shutil.copyfile(path, copy)


def partial_of(path: Path, *, process: int | None = None) -> Path:
    """What a process (this one) writes before it is ``path``: its own, since others may be writing the same file."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{process or os.getpid()}.partial")
