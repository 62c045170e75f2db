"""An append-only file whose writes are retried after the disk was full."""

from __future__ import annotations

from pathlib import Path

from pretrain.runtime.console import notice
from pretrain.runtime.files import open_append


class RetryingAppendFile:
    """A file that writes unbuffered, so that everything written before a kill is on disk.

    Bytes that could not be written are kept in order and retried with the next write. The first failure is reported; later
    ones are not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_append(path, mode="ab", buffering=0)
        self._pending = b""
        self._failure_reported = False

    def write(self, data: bytes) -> None:
        """Append ``data``, after any bytes that could not be written before."""
        self._pending += data
        self.flush()

    def flush(self) -> None:
        """Try to write all pending bytes."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._failure_reported:
                notice(
                    f"{self._path} can't be written: {error.strerror}; its records are kept and written later; the run continues"
                )
            self._failure_reported = True

    def close(self) -> None:
        self.flush()
        self._file.close()
