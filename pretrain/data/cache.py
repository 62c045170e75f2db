"""The folder of the token cache and atomic writing into it. No file in the cache is ever changed in place."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import DISK_FULL, atomic_file, make_folder
from pretrain.runtime.filesystem import expanded
from pretrain.runtime.folders import check_private
from pretrain.runtime.locks import Busy, Lock

# A wait for the lock up to this long is not reported. Ranks that open a filled cache at the same time wait less.
UNREPORTED_WAIT_SECONDS = 2.0
ABANDONED_SECONDS = 86_400.0  # a temporary file this old belongs to a process that was killed


def cache_dir() -> Path:
    """Return ``$PRETRAIN_CACHE``, else ``$XDG_CACHE_HOME/pretrain``, else ``~/.cache/pretrain``.

    Raises ``UserError`` for an account without a home folder.
    """
    if named := os.environ.get("PRETRAIN_CACHE"):
        return expanded(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return expanded(base) / "pretrain"
    home = expanded("~")
    if not home.is_absolute():
        raise UserError("no place for the token cache: this account has no home; set PRETRAIN_CACHE to a folder")
    return home / ".cache/pretrain"


def make_private(cache: Path) -> None:
    """Create the cache's folder if it is missing. Raises ``UserError`` where other users could change what is read from it."""
    with cache_errors(cache):
        make_folder(cache)
    check_private(cache, "PRETRAIN_CACHE")


@contextmanager
def exclusive(path: Path, name: str) -> Iterator[None]:
    """Hold the dataset's lock. A second process waits and then finds the work done. The kernel releases the lock of a process
    that died."""
    lock = Lock(path)
    with cache_errors(path.parent):
        make_folder(path.parent)
        try:
            lock.acquire(timeout=UNREPORTED_WAIT_SECONDS)
        except Busy:
            notice(f"dataset {name!r}: another run is filling the token cache; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def cache_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file of the cache, see `atomic_file`; it is flushed to disk.

    Raises:
        UserError: the disk (or a quota, or a file size limit) is full, or the folder cannot be written.
    """
    with cache_errors(path.parent):
        make_folder(path.parent)
        with atomic_file(path, flush=True) as file:
            yield file


def ensure_content(path: Path, content: bytes) -> None:
    """Make sure that a small file, whose name derives from its ``content``, holds this content. It is written if it is missing or
    was corrupted on disk."""
    try:
        is_intact = path.read_bytes() == content
    except OSError:
        is_intact = False
    if not is_intact:
        with cache_file(path) as file:
            file.write(content)


def used_now(path: Path) -> None:
    """Set the modification time of a file or folder of the cache to now: its last use, by which `pretrain.tools.cache` prunes."""
    with suppress(OSError):  # it belongs to another user
        os.utime(path)


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files that killed processes left behind at least a day ago."""
    for temporary in (*folder.glob("*/.*.partial"), *folder.glob("*/.*.tmp")):  # .tmp: of earlier versions
        with suppress(OSError):  # another run deleted it already, or it belongs to another user
            if time.time() - temporary.lstat().st_mtime > ABANDONED_SECONDS:
                temporary.unlink()


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Convert an ``OSError`` raised while writing into ``folder`` into a ``UserError``."""
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
