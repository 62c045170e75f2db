"""Where tokens are kept, and how a file gets there: whole or not at all. Nothing in the cache is ever changed in
place."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pretrain.errors import UserError

ABANDONED_SECONDS = 86_400.0  # a temporary file this old belongs to a process that was killed
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def cache_dir() -> Path:
    """``$PRETRAIN_CACHE``, else ``$XDG_CACHE_HOME/pretrain``, else ``~/.cache/pretrain``."""
    if named := os.environ.get("PRETRAIN_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "pretrain"


@contextmanager
def whole_or_absent(path: Path) -> Iterator[IO[bytes]]:
    """Write ``path`` through a temporary file in the same folder; it gets its name only when it is complete and on
    disk.

    Raises:
        UserError: the disk (or a quota, or a file size limit) is full, or the folder cannot be written.
    """
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp"
    try:
        with _cache_errors(path.parent), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file, whole or absent."""
    with whole_or_absent(path) as file:
        file.write(content)


def make_folder(path: Path) -> None:
    with _cache_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files that killed processes left a day ago or earlier."""
    for temporary in folder.glob("*/.*.tmp"):
        try:
            if time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS:
                temporary.unlink()
        except FileNotFoundError:  # another run was quicker
            continue


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"disk full while writing the token cache {folder} ({error.strerror}); "
                "what was finished before is kept: free some space or set PRETRAIN_CACHE to another disk, "
                "then run the same command again"
            ) from error
        if error.errno in NOT_WRITABLE:
            raise UserError(
                f"cannot write the token cache {folder} ({error.strerror}); "
                "set PRETRAIN_CACHE to a folder you can write"
            ) from error
        raise
