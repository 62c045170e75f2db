"""A file that records are appended to, on disks that are full for a while."""

from __future__ import annotations

from pathlib import Path

from pretrain.runtime.console import notice
from pretrain.runtime.safe_files import open_append


class RetryingAppendFile:
    """Bytes are written at once, so that a killed run has all of them up to the kill. What a disk does not take waits, in
    order, and is tried again with the next write; it is said once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_append(path, mode="ab", buffering=0)
        self._waiting = b""
        self._said = False

    def write(self, data: bytes) -> None:
        self._waiting += data
        self.flush()

    def flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._said:
                notice(f"{self._path} can't be written: {error.strerror}; its records wait, the run goes on")
            self._said = True

    def close(self) -> None:
        self.flush()
        self._file.close()
