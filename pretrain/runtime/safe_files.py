"""Writing in folders where somebody else may have put something: a link is never followed, and a pipe never waited for.

A folder of a run, a sweep or the cache is ours alone (`pretrain.runtime.folders.check_private`); this is for what lay
there before.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import IO, Any

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def open_file(path: Path, flags: int, mode: int = 0o666, *, truncate: bool = False) -> int:
    """A descriptor of the regular file ``path``, which is made where there is none, and emptied with ``truncate``. One with
    another name elsewhere (a hard link) is replaced by a copy first, so that what lies under the other name stays as it is.

    Raises ``OSError`` for a link, and for what is no regular file.
    """
    handle = os.open(path, flags | os.O_CREAT | NO_FOLLOW, mode)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_nlink > 1:
        os.close(handle)
        _own_copy(path)
        return open_file(path, flags, mode, truncate=truncate)
    if truncate:
        os.ftruncate(handle, 0)
    return handle


def _own_copy(path: Path) -> None:
    copy = path.with_name(f".{path.name}.{os.getpid()}.copy")
    copy.unlink(missing_ok=True)
    with path.open("rb") as old, os.fdopen(open_file(copy, os.O_WRONLY | os.O_EXCL), "wb") as new:
        shutil.copyfileobj(old, new)
    os.replace(copy, path)


def open_append(path: Path, **options: Any) -> IO[Any]:
    """``path`` opened to append; ``options``: of ``os.fdopen``."""
    return os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND), **options)


def open_new(path: Path, **options: Any) -> IO[Any]:
    """``path`` made anew, in the place of a file or a link of that name."""
    path.unlink(missing_ok=True)
    return os.fdopen(open_file(path, os.O_WRONLY | os.O_EXCL), **options)


def own_folder(path: Path) -> Path:
    """Make a folder where there is none, and return it. Raises ``OSError`` for a link, and for what is no folder."""
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path} is a link to {os.path.realpath(path)}", str(path))
    return path
