"""A remote file as a seekable stream. It is read in blocks of a fixed grid, of which the last ones are kept in memory, since a
piece of a file is read twice: for its hash and for its documents. Nothing is written to disk."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TypeVar

from pretrain.data.reading.opening import changed_while_read
from pretrain.data.reading.units import Stamp
from pretrain.data.remote.backend import Interrupted, backend_of
from pretrain.runtime.errors import UserError

T = TypeVar("T")
BLOCK_BYTES = 256 << 10
MOST_BLOCKS = 16  # of one request; a sequential read begins with one block and doubles
KEPT_BYTES = 32 << 20  # of all files of this process; a piece has 12 MB at most, unless its file can't be cut
ATTEMPTS = 6  # without progress
BACKOFF_SECONDS = 0.5  # before the second attempt, doubled for each later one: 15 s altogether
PROGRESS_BYTES = 64 << 10  # a connection that brought less does not count as progress


def open_remote(url: str, stamp: Stamp) -> IO[bytes]:
    """Return a buffered stream of a remote file with this stamp."""
    return io.BufferedReader(RemoteFile(url, stamp), BLOCK_BYTES)


class RemoteFile(io.RawIOBase):
    """A raw, seekable stream of a remote file."""

    def __init__(self, url: str, stamp: Stamp) -> None:
        self._url, self._stamp, self._size = url, stamp, stamp[0]
        self._at = 0
        self._next, self._ahead = -1, 1  # the block after the last request, and the number of blocks of the request

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size or not len(buffer):
            return 0
        number, inside = divmod(self._at, BLOCK_BYTES)
        block = self._block(number)
        count = min(len(buffer), len(block) - inside)
        buffer[:count] = block[inside : inside + count]
        self._at += count
        return count

    def _block(self, number: int) -> memoryview:
        """Return a block, which is requested together with those that follow it where the stream is read sequentially."""
        found = KEPT.get((self._url, self._stamp, number))
        if found is None:
            self._ahead = min(2 * self._ahead, MOST_BLOCKS) if number == self._next else 1
            start, stop = number * BLOCK_BYTES, min((number + self._ahead) * BLOCK_BYTES, self._size)
            content = memoryview(read_range(self._url, start, stop, self._stamp))
            self._next = number + self._ahead
            for index in range(-(-len(content) // BLOCK_BYTES)):
                block = content[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                KEPT.put((self._url, self._stamp, number + index), block)
            found = content[:BLOCK_BYTES]
        return found


def read_range(url: str, start: int, stop: int, stamp: Stamp) -> bytes:
    """Return bytes [start, stop) of a remote file. Where a connection was lost, the next request begins at the first byte that is
    missing.

    Raises ``UserError`` after ``ATTEMPTS`` requests without progress.
    """
    found, failures = bytearray(), 0
    while missing := stop - start - len(found):
        reason = "the connection was lost"
        try:
            block = backend_of(url).fetch(url, start + len(found), stop, stamp)
        except Interrupted as error:
            block, reason = b"", str(error)
            _check_unchanged(url, stamp)
        if len(block) > missing:
            raise UserError(f"{url}: the server has sent {len(block):,} bytes, but {missing:,} were requested")
        found += block
        if len(block) == missing:
            break
        failures = 1 if len(block) >= PROGRESS_BYTES else failures + 1
        if failures >= ATTEMPTS:
            raise UserError(
                f"{url}: can't be read at byte {start + len(found):,} after {ATTEMPTS} attempts ({reason}); the same command "
                "continues where it stopped"
            )
        time.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))
    return bytes(found)


def patiently(url: str, request: Callable[[], T]) -> T:
    """Return the answer to a request, which is repeated where it failed for a reason that may pass."""
    for attempt in itertools.count(1):
        try:
            return request()
        except Interrupted as error:
            if attempt == ATTEMPTS:
                raise UserError(f"{url}: can't be read after {ATTEMPTS} attempts ({error})") from error
        time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
    raise AssertionError


def _check_unchanged(url: str, stamp: Stamp) -> None:
    """Raise ``UserError`` if the file has another stamp now; a range beyond its end can't be read at any attempt."""
    with suppress(Interrupted):
        if backend_of(url).stamp(url) != stamp:
            raise UserError(changed_while_read(url))


class _Kept:
    """The blocks that were read last, up to ``KEPT_BYTES``."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, Stamp, int], memoryview] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, key: tuple[str, Stamp, int]) -> memoryview | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: tuple[str, Stamp, int], block: memoryview) -> None:
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = memoryview(bytes(block))  # a slice would keep the entire answer alive
                self._bytes += len(block)
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._blocks.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._bytes = 0


KEPT = _Kept()
