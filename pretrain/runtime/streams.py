"""Standard streams that can't hold a run up: a pipe that nobody reads, a terminal that was paused, closed or never there.

A thread of its own carries what is said to its descriptor. Where that does not take it, lines are lost, and counted; a run
is worth more than what it says.
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

MOST_WAITING = 1000  # pieces of text
PATIENCE_SECONDS = 1.0  # how long nothing may move, at the end, before what still waits is given up
READER_GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # EIO: a terminal that has hung up


class NonBlockingStream(io.TextIOBase):
    """A text stream over the descriptor of ``stream`` whose ``write`` and ``flush`` never wait, in a signal handler
    either."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._descriptor = stream.fileno()
        self._waiting: SimpleQueue[str | threading.Event] = SimpleQueue()  # the one queue that a handler may use
        self._lost = 0
        self._bytes_out = 0
        self._reader_gone = False
        threading.Thread(target=self._carry, name="outlet", daemon=True).start()

    def write(self, text: str) -> int:
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(text)
        else:
            self._lost += text.count("\n")
        return len(text)

    def flush(self) -> None:
        """Wait until all of it is out, or nothing has moved for ``PATIENCE_SECONDS``."""
        done = threading.Event()
        self._waiting.put(done)
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

    def _carry(self) -> None:
        while True:
            item = self._waiting.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._put_out(item)
            if self._lost:
                lost, self._lost = self._lost, 0
                self._put_out(f"… {lost} lines are missing here: nobody read them in time …\n")

    def _put_out(self, text: str) -> None:
        left = text.encode(self.encoding, "backslashreplace")
        while left and not self._reader_gone:
            try:
                written = os.write(self._descriptor, left)
                left = left[written:]
                self._bytes_out += written
            except BlockingIOError:  # someone who shares it has made it non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._reader_gone = error.errno in READER_GONE
                return  # a full disk behind it may have room later


def ensure_open() -> None:
    """Give a process that was started without a standard stream (``>&-``) an empty one. Otherwise Python has ``None``
    there, and the next file that is opened would get, and be, the descriptor that libraries write their words to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            empty = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
            os.set_inheritable(empty.fileno(), True)
            setattr(sys, name, empty)


def never_wait() -> None:
    """From now on stdout and stderr are outlets, settled at the latest when Python ends. What is no descriptor (a test's,
    a notebook's) stays."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError):
            if not isinstance(stream, NonBlockingStream):
                stream.flush()
                setattr(sys, name, NonBlockingStream(stream))
                atexit.register(flush)


def flush() -> None:
    """Before a process leaves: get out what can be got out, and put the streams back as they were. A reader that is gone
    is no failure, neither now nor for Python's own last flush."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, NonBlockingStream):
            stream.flush()
            setattr(sys, name, stream.stream)
            continue
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
