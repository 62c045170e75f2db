"""Safe writing in folders that may contain other users' entries: links are never followed and pipes never waited for.

Other users can't write to the folder of a run, a sweep or the cache (`pretrain.runtime.folders.check_private`); this
protects against entries that existed before.
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
    """Return a descriptor of the regular file ``path``. It is created if it does not exist, and emptied with ``truncate``. A file
    with several hard links is replaced by a copy first, so that the content under its other names is not changed.

    Raises ``OSError`` for a symbolic link and for anything else that is not a regular file.
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
    """Open ``path`` for appending; ``options`` are those of ``os.fdopen``."""
    return os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND), **options)


def open_new(path: Path, **options: Any) -> IO[Any]:
    """Create the file ``path``; an existing file or link of that name is removed first."""
    path.unlink(missing_ok=True)
    return os.fdopen(open_file(path, os.O_WRONLY | os.O_EXCL), **options)


def own_folder(path: Path) -> Path:
    """Create a folder if it does not exist, and return it. Raises ``OSError`` for a link and for anything but a folder."""
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path} is a link to {os.path.realpath(path)}", str(path))
    return path
