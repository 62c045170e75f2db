"""Files that are read by offset, and stay the ones that they were when they were opened first."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from pathlib import Path

from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import stamp_from

MAX_OPEN = 128  # 1024 is the usual limit of a process
BLOCK = 1 << 30  # bytes of one system call, which some systems limit to 2 GiB


class OpenFile:
    """An open file, which is closed when nothing refers to it. A file that takes its name is not read through it."""

    def __init__(self, path: str | Path) -> None:
        """Open ``path``. Raises ``OSError``."""
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self.number)

    @property
    def stamp(self) -> tuple[int, int, int]:
        """Size, mtime and inode as they are now."""
        return stamp_from(os.fstat(self.number))


class OpenFiles:
    """Several files, of which those that were read last are kept open. One that has to be opened again must be the same."""

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, OpenFile] = OrderedDict()
        self._stamps: dict[Path, tuple[int, int, int]] = {}

    def add(self, path: Path) -> OpenFile:
        """Open a file, which from now on must not change. Raises ``OSError``."""
        file = OpenFile(path)
        self._stamps[path] = file.stamp
        return self._keep(path, file)

    def is_current(self, path: Path) -> bool:
        """Return whether the path still leads to the file that was added. Raises ``OSError``."""
        return stamp_from(os.stat(path)) == self._stamps[path]

    def read_into(self, path: Path, into: memoryview, start: int) -> None:
        """Read ``len(into)`` bytes from ``start`` on. Raises ``UserError`` if the file has changed since it was added."""
        file, done = self._opened(path), 0
        while done < len(into):
            count = os.preadv(file.number, [into[done : done + BLOCK]], start + done)
            if not count:
                raise UserError(f"{path}: the file has become shorter since it was opened")
            done += count
        if file.stamp[:2] != self._stamps[path][:2]:
            raise UserError(f"{path}: the file was written to while it was in use")

    def _opened(self, path: Path) -> OpenFile:
        if (file := self._open.get(path)) is not None:
            self._open.move_to_end(path)
            return file
        try:
            file = OpenFile(path)
        except OSError as error:
            raise UserError(f"{path}: can't be opened again: {error.strerror}") from None
        if file.stamp != self._stamps[path]:
            raise UserError(f"{path}: another file has taken its place while it was in use")
        return self._keep(path, file)

    def _keep(self, path: Path, file: OpenFile) -> OpenFile:
        self._open[path] = file
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return file
