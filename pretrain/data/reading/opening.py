"""Open a file by its path or URL. A file on this machine is opened by the system and mapped into memory where a format allows it;
a remote one is a stream of ranges of bytes (`pretrain.data.remote.stream`), of which nothing is written to disk."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import IO, Any

from pretrain.data.reading.units import Stamp
from pretrain.runtime.errors import UserError
from pretrain.runtime.places import is_url

# Types of file systems. The kernel or the server numbers their files as they are met, so the numbers differ between machines.
WITHOUT_LASTING_INODES = ("fuse ", "fuse.", "cifs ", "smb3 ", "9p ", "vboxsf ")


def stamp_of(path: str | Path) -> Stamp:
    """Return the current stamp of a file. Raises ``OSError``, and ``UserError`` for a URL without a file."""
    if isinstance(path, str) and is_url(path):
        from pretrain.data.remote.backend import backend_of
        from pretrain.data.remote.stream import patiently

        found = patiently(path, lambda: backend_of(path).stamp(path))
        if found is None:
            raise UserError(f"{path}: no such file")
        return found
    stat = os.stat(path)
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


def changed_while_read(path: str) -> str:
    """Return the message about a file that changed while it was being read."""
    return f"{path}: the file changed while it was being read; start again when nothing writes to it"


def open_file(path: str, stamp: Stamp) -> IO[bytes]:
    """Return a buffered, seekable stream of the bytes of a file with this stamp. The caller closes it."""
    if is_url(path):
        from pretrain.data.remote.stream import open_remote

        return open_remote(path, stamp)
    return open(path, "rb")


def open_arrow(path: str, stamp: Stamp, *, mapped: bool = False) -> Any:
    """Return a file of pyarrow; with ``mapped`` what is not looked at is not read, unless the file is remote."""
    import pyarrow as pa

    if is_url(path):
        return pa.PythonFile(open_file(path, stamp), "r")
    return pa.memory_map(path) if mapped else pa.OSFile(path)


def parquet_source(path: str, stamp: Stamp) -> Any:
    """Return what ``pyarrow.parquet`` opens."""
    return open_arrow(path, stamp) if is_url(path) else path
