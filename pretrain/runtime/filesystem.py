"""What not every file system, container or account can do, each in one place: flush a folder, change a mode, map a file,
rename across devices, say how much room there is, have a home or a place for temporary files.

Network and foreign disks (NFS, CIFS, FUSE, exFAT) answer such calls with an error although the data is well; then the
run does without. What it can't do without becomes a ``UserError``.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The file system has no such thing.
CANNOT = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}
MAY_NOT = {errno.EPERM, errno.EACCES}  # this user may not use it
SOCKET_BYTES = 60  # what a temporary folder's name may have: a socket's has 107, with a folder and a name of its own


def flush(path: Path) -> None:
    """fsync a file or a folder, where that is possible. Raises ``OSError`` where data did not reach the disk."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if is_folder and error.errno in CANNOT | MAY_NOT:  # one that may be written but not read
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
    """chmod, where files have modes of their own."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in CANNOT | MAY_NOT:
            raise


def move(path: Path, to: Path) -> None:
    """Rename a file or folder; copy it where it lies on another device, as the lower layers of a container's disk do."""
    try:
        os.rename(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(path, to)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copy(path: Path, to: Path) -> None:
    """The content alone: modes and times can't be kept everywhere."""
    if not path.is_dir():
        shutil.copyfile(path, to)
        return
    to.mkdir()
    for inner in path.iterdir():
        _copy(inner, to / inner.name)


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file: mapped into memory, or read where files can't be mapped. Raises ``OSError``, and ``ValueError`` for
    an empty one."""
    import numpy as np

    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        if error.errno not in CANNOT | {errno.ENODEV, errno.EACCES, errno.EPERM}:
            raise
        return np.fromfile(path, np.uint8)


def free_bytes(folder: Path) -> int | None:
    """The room that there is; ``None`` where the file system does not say. Raises ``OSError``: no such folder."""
    try:
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else None
    except OSError as error:
        if error.errno not in CANNOT | MAY_NOT:
            raise
        return None


def expanded(path: str | Path) -> Path:
    """``path`` with its ``~``; as it is where this account has no home (no HOME, no entry in passwd)."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_temporary_folder() -> None:
    """Raises ``UserError`` where no temporary file can be made, nor the cache that torch makes when it is imported."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"no folder for temporary files: {error.strerror or error}; set TMPDIR to one") from None
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"TORCHINDUCTOR_CACHE_DIR={folder}: can't be made: {error.strerror}; set it to another folder, or not at all"
            ) from None


def check_place_for_sockets() -> None:
    """Raises ``UserError`` where the temporary folder's name is too long for a socket in it."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > SOCKET_BYTES:
        raise UserError(
            f"TMPDIR={folder}: too long a name for the sockets of several processes; set it to a shorter one"
        )
