"""Operations that not every file system, container or account supports: flushing a folder, changing a mode, mapping a file,
renaming across devices, reading the free space, a home folder, a folder for temporary files.

Network and foreign file systems (NFS, CIFS, FUSE, exFAT) answer such calls with an error although the data is intact. Then
the run continues without the operation. If the operation is necessary, a ``UserError`` is raised.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The file system does not support the operation.
CANNOT = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}
MAY_NOT = {errno.EPERM, errno.EACCES}  # this user is not allowed to use it
# Types of file systems. The kernel or the server numbers their files as they are met, so the numbers differ between machines.
WITHOUT_LASTING_INODES = ("fuse ", "fuse.", "cifs ", "smb3 ", "9p ", "vboxsf ")
SOCKET_BYTES = 60  # maximal length of the temporary folder's path: a socket's path below it may have 107 bytes


def flush(path: Path) -> None:
    """fsync a file or a folder, if the file system supports that. Raises ``OSError`` if data did not reach the disk."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if is_folder and error.errno in CANNOT | MAY_NOT:  # this folder may be writable but not readable
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (CANNOT | MAY_NOT if is_folder else CANNOT):
            raise
    finally:
        os.close(handle)


def set_mode(path: Path, mode: int) -> None:
    """chmod a file, if the file system supports modes."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in CANNOT | MAY_NOT:
            raise


def move(path: Path, to: Path) -> None:
    """Rename a file or folder. If it is on another device, as in the lower layers of a container's disk, copy it instead."""
    try:
        os.rename(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(path, to)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copy(path: Path, to: Path) -> None:
    """Copy the content only, because not every file system can keep modes and times."""
    if not path.is_dir():
        shutil.copyfile(path, to)
        return
    to.mkdir()
    for inner in path.iterdir():
        _copy(inner, to / inner.name)


def mapped(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file, mapped into memory, or read if it can't be mapped. Raises ``OSError``, and ``ValueError`` if
    the file is empty."""
    import numpy as np

    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        if error.errno not in CANNOT | {errno.ENODEV, errno.EACCES, errno.EPERM}:
            raise
        return np.fromfile(path, np.uint8)


def read_at(file: int, start: int, count: int) -> NDArray[np.uint8]:
    """Return the bytes [start, start + count) of an open file. Raises ``OSError``, and ``EOFError`` if the file ends before.

    Another program may truncate a file that it owns. Reading what was mapped of it then ends the process with SIGBUS.
    """
    import numpy as np

    found = bytearray()
    while len(found) < count:
        block = os.pread(file, count - len(found), start + len(found))
        if not block:
            raise EOFError(f"the file has no byte {start + len(found):,}")
        found += block
    return np.frombuffer(found, np.uint8)


def stamp_from(stat: os.stat_result) -> tuple[int, int, int]:
    """Return size, mtime in nanoseconds and inode, by which a file is known again; 0 in place of an inode that does not last."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino if has_lasting_inodes(stat.st_dev) else 0


@cache
def has_lasting_inodes(device: int) -> bool:
    """Return whether a file on a device keeps its inode, and has the same one on all machines that mount it. Only Linux tells the
    kind of a file system."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    return not any(is_mount_without_inodes(line, f"{os.major(device)}:{os.minor(device)}") for line in lines)


def is_mount_without_inodes(line: str, device: str) -> bool:
    """Return whether a line of mountinfo (see proc(5)) is the mount of ``device``, and its inodes are made up when it is used."""
    mount, _, kind = line.partition(" - ")
    return mount.split()[2:3] == [device] and kind.startswith(WITHOUT_LASTING_INODES)


def free_bytes(folder: Path) -> int | None:
    """Return the free space; ``None`` if the file system does not report it. Raises ``OSError`` if there is no such folder."""
    try:
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else None
    except OSError as error:
        if error.errno not in CANNOT | MAY_NOT:
            raise
        return None


def expanded(path: str | Path) -> Path:
    """Return ``path`` with ``~`` expanded; unchanged if this account has no home (no HOME, no entry in passwd)."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_temporary_folder() -> None:
    """Raise ``UserError`` if temporary files, or the cache folder that torch creates at import, can't be created."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"no folder for temporary files: {error.strerror or error}; set TMPDIR to one") from None
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"TORCHINDUCTOR_CACHE_DIR={folder}: can't be created: {error.strerror}; set it to another folder, or unset it"
            ) from None


def check_place_for_sockets() -> None:
    """Raise ``UserError`` if the temporary folder's path is too long for a socket in it."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > SOCKET_BYTES:
        raise UserError(
            f"TMPDIR={folder}: this path is too long for the sockets of several processes; set it to a shorter one"
        )
