"""Standard streams that can't block a run: a pipe that is not read, or a terminal that is paused, closed or missing.

A thread writes the output to its descriptor. If the descriptor does not accept it, lines are dropped and counted, because
training matters more than its output.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import select
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import TextIO

MOST_WAITING = 1000  # maximal number of queued writes
PATIENCE_SECONDS = 1.0  # at the end, the queued output is dropped if none of it could be written for so long
READER_GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # EIO: a terminal that has hung up


class NonBlockingStream(io.TextIOBase):
    """A text stream over the descriptor of ``stream`` whose ``write`` and ``flush`` never block, not even in a signal handler."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._descriptor = stream.fileno()
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()  # safe in a signal handler
        self._lost = 0
        self._bytes_out = 0
        self._reader_gone = False
        threading.Thread(target=self._write_queued, name="outlet", daemon=True).start()

    def write(self, text: str) -> int:
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put(text)
        else:
            self._lost += text.count("\n")
        return len(text)

    def drain(self) -> None:
        """Wait until all output is written, or no byte could be written for ``PATIENCE_SECONDS``."""
        done = threading.Event()
        self._queue.put(done)
        before = -1
        while not done.wait(PATIENCE_SECONDS) and self._bytes_out != before:
            before = self._bytes_out

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self.stream.isatty()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def _write_queued(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._write_out(item)
            if self._lost:
                lost, self._lost = self._lost, 0
                self._write_out(f"… {lost} lines are missing here: they were not read in time …\n")

    def _write_out(self, text: str) -> None:
        left = text.encode(self.encoding, "backslashreplace")
        while left and not self._reader_gone:
            try:
                written = os.write(self._descriptor, left)
                left = left[written:]
                self._bytes_out += written
            except BlockingIOError:  # another process that shares it has made it non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._reader_gone = error.errno in READER_GONE
                return  # for example a full disk, which may have space later


def ensure_open() -> None:
    """Open an empty stream for each standard stream without which the process was started (``>&-``). Otherwise Python has
    ``None`` there, and the next opened file would get the descriptor to which libraries write their messages."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            empty = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
            os.set_inheritable(empty.fileno(), True)
            setattr(sys, name, empty)


def make_nonblocking() -> None:
    """Replace stdout and stderr with non-blocking streams, which are flushed at the latest when Python exits. Streams without
    a descriptor (in a test or a notebook) are not replaced."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError):
            if not isinstance(stream, NonBlockingStream):
                stream.flush()
                setattr(sys, name, NonBlockingStream(stream))
                atexit.register(flush)


def flush() -> None:
    """Before a process exits, write what can be written and restore the original streams. A closed reader is not an error,
    neither here nor in Python's own last flush."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, NonBlockingStream):
            stream.drain()
            setattr(sys, name, stream.stream)
            continue
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
