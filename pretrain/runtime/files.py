"""Writing of files and folders: completely or not at all, and never into another user's entries.

A file or a folder is written under a temporary name beside its own and renamed when it is complete, so that a reader finds the
old content or the new one, also after a crash. Links are never followed and pipes never waited for: other users can't write to
the folder of a run, a sweep or the cache (`pretrain.runtime.folders.check_private`); this protects against entries that existed
before.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pretrain.runtime import filesystem

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, a quota or a limit of the size of a file
NEW_FOLDER = 0o775  # mode of new folders, so that other users can't write with any umask
LEFTOVERS = ("partial", "removed", "replaced")  # suffixes of folders that a killed process was writing or deleting

# Files ------------------------------------------------------------------------------------------------------------------


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
        with path.open("rb") as old, atomic_file(path) as new:
            shutil.copyfileobj(old, new)
        return open_file(path, flags, mode, truncate=truncate)
    if truncate:
        os.ftruncate(handle, 0)
    return handle


def open_append(path: Path, **options: Any) -> IO[Any]:
    """Open ``path`` for appending; ``options`` are those of ``os.fdopen``."""
    return os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND), **options)


def open_new(path: Path, **options: Any) -> IO[Any]:
    """Create the file ``path``; an existing file or link of that name is removed first."""
    path.unlink(missing_ok=True)
    return os.fdopen(open_file(path, os.O_WRONLY | os.O_EXCL), **options)


@contextmanager
def atomic_file(path: Path, *, flush: bool = False) -> Iterator[IO[bytes]]:
    """Write ``path``: the body of the ``with`` statement writes into a temporary file, which is then renamed. ``flush`` calls
    fsync before, to survive a power cut too.

    After an error the temporary file is deleted and ``path`` is unchanged. Raises ``OSError`` if it can't be written.
    """
    partial = partial_of(path)
    try:
        with open_new(partial, mode="wb") as file:
            yield file
            if flush:
                file.flush()
                filesystem.flush(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def replace_file(path: Path, content: str | bytes, *, flush: bool = False) -> None:
    """Write ``content`` to ``path`` as `atomic_file` does; text is encoded as UTF-8."""
    with atomic_file(path, flush=flush) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def partial_of(path: Path, *, process: int | None = None) -> Path:
    """Return the temporary file that this thread renames to ``path``, or a pattern of those of ``process``. Every thread has
    its own, since several may write the same file."""
    owner = f"{os.getpid()}-{threading.get_native_id()}" if process is None else f"{process}-*"
    return path.with_name(f".{path.name}.{os.uname().nodename}.{owner}.partial")


def keep_copy(path: Path) -> None:
    """Copy ``path`` to ``<name>.broken`` in its folder, before it is rewritten without its unreadable parts. An existing copy
    is not overwritten."""
    copy = path.with_name(f"{path.name}.broken")
    if not os.path.lexists(copy):
        with suppress(OSError):  # a full disk: saving the readable records matters more
            shutil.copyfile(path, copy)


# Folders ----------------------------------------------------------------------------------------------------------------


def own_folder(path: Path) -> Path:
    """Create a folder if it does not exist, and return it. Raises ``OSError`` for a link and for anything but a folder."""
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path} is a link to {os.path.realpath(path)}", str(path))
    return path


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, which other users can't write to, and flush them to disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(NEW_FOLDER, exist_ok=True)
        filesystem.flush(path.parent)


def begin_folder(path: Path) -> Path:
    """Return a new temporary folder, which `finish_folder` renames to ``path``. What a killed process has left of it is
    deleted."""
    make_folder(path.parent)
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def partial_folder(path: Path) -> Path:
    """Return the temporary folder of ``path``. All processes of a run write into the same one."""
    return path.with_name(f"{path.name}.partial")


def write_files(files: Mapping[str, bytes], folder: Path, alive: Callable[[], None] = lambda: None) -> list[Path]:
    """Write small files, by their names in ``folder``, into a temporary folder. Return their paths. ``alive`` is called after
    every file."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        alive()
    return [folder / name for name in files]


def finish_folder(path: Path) -> None:
    """Flush the temporary folder of ``path`` (its files are flushed already) and rename it. An older ``path`` is first renamed
    and at last deleted."""
    partial, old = partial_folder(path), path.with_name(f"{path.name}.replaced")
    for folder in (*filter(Path.is_dir, partial.rglob("*")), partial):
        filesystem.flush(folder)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        filesystem.move(path, old)
    filesystem.move(partial, path)
    filesystem.flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that a partly deleted one is never taken for an incomplete one."""
    renamed = path.with_name(f"{path.name}.removed")
    filesystem.move(path, renamed)
    shutil.rmtree(renamed)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete what killed processes have left of folders named ``pattern`` that they were writing or deleting."""
    for suffix in LEFTOVERS:
        for left in folder.glob(f"{pattern}.{suffix}"):
            shutil.rmtree(left, ignore_errors=True)
