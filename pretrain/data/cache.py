"""Where tokens are kept, and how a file gets there: whole or not at all. Nothing in the cache is ever changed in
place."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import expanded, flush

ABANDONED_SECONDS = 86_400.0  # a temporary file this old belongs to a process that was killed
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_dir() -> Path:
    """``$PRETRAIN_CACHE``, else ``$XDG_CACHE_HOME/pretrain``, else ``~/.cache/pretrain``.

    Raises ``UserError`` for an account without a home.
    """
    if named := os.environ.get("PRETRAIN_CACHE"):
        return expanded(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return expanded(base) / "pretrain"
    home = expanded("~")
    if not home.is_absolute():
        raise UserError("no place for the token cache: this account has no home; set PRETRAIN_CACHE to a folder")
    return home / ".cache/pretrain"


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
        with cache_errors(path.parent), open(temporary, "xb") as file:
            yield file
            file.flush()
            flush(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file, whole or absent."""
    with whole_or_absent(path) as file:
        file.write(content)


def keep_whole(path: Path, content: bytes) -> None:
    """See to it that a small file named after its ``content`` holds that: it is written where it is not there, or a disk has made
    something else of it."""
    try:
        kept = path.read_bytes() == content
    except OSError:
        kept = False
    if not kept:
        write_whole(path, content)


def make_folder(path: Path) -> None:
    with cache_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files that killed processes left a day ago or earlier."""
    for temporary in folder.glob("*/.*.tmp"):
        with suppress(OSError):  # another run was quicker, or it is another user's
            if time.time() - temporary.lstat().st_mtime > ABANDONED_SECONDS:
                temporary.unlink()


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"disk full while writing the token cache {folder} ({error.strerror}); "
                "what was finished before is kept: free some space or set PRETRAIN_CACHE to another disk, "
                "then run the same command again"
            ) from error
        raise UserError(
            f"cannot write the token cache {folder} ({error.strerror or error}); "
            "set PRETRAIN_CACHE to a folder you can write"
        ) from error
