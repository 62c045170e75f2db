"""Open a file by its path or URL. A file on this machine is opened by the system and mapped into memory where a format allows it;
a remote one is a stream of ranges of bytes (`pretrain.data.remote.stream`), of which nothing is written to disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from pretrain.data.reading.units import Stamp
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import stamp_from
from pretrain.runtime.places import is_url


def stamp_of(path: str | Path) -> Stamp:
    """Return the current stamp of a file. Raises ``OSError``, and ``UserError`` for a URL without a file."""
    if isinstance(path, str) and is_url(path):
        from pretrain.data.remote.backend import backend_of
        from pretrain.data.remote.stream import patiently

        found = patiently(path, lambda: backend_of(path).stamp(path))
        if found is None:
            raise UserError(f"{path}: no such file")
        return found
    return stamp_from(os.stat(path))


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
