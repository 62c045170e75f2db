"""What the file systems of URLs have in common: a stamp of a file, the files below a folder, and ranges of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache

import xxhash

from pretrain.data.reading.units import Stamp
from pretrain.data.remote.addresses import is_web, protocol_of

NEVER = 1 << 62  # ns; a "time of the last change" after any start, with which a file is read again at each start


class Interrupted(OSError):
    """A request failed for a reason that may pass: a lost connection, a timeout, an overloaded server."""


class Backend(ABC):
    """A file system whose files have URLs. Its methods raise ``UserError`` and ``Interrupted``."""

    @abstractmethod
    def stamp(self, url: str) -> Stamp | None:
        """Return the current stamp of a file; ``None`` if there is no file of that name."""

    @abstractmethod
    def below(self, url: str, depth: int | None = None) -> Iterator[tuple[str, Stamp]]:
        """Yield URL and stamp of the files below a folder, at most ``depth`` levels below it."""

    @abstractmethod
    def fetch(self, url: str, start: int, stop: int, stamp: Stamp) -> bytes:
        """Return bytes [start, stop) of a file, or only the first of them where the connection was lost."""


def remote_stamp(size: int, *, version: str | None, changed: float | None = None) -> Stamp:
    """Return the stamp of a remote file: its size, and a hash of what changes with its content.

    Args:
        size: bytes.
        version: the ETag or another text that is another one for another content; ``None`` if the server has none.
        changed: time of the last change, in seconds; only where there is no version.
    """
    if version is None and changed is None:
        return size, NEVER, 0
    digest = xxhash.xxh3_64_intdigest((version if version is not None else f"time {changed}").encode()) >> 1
    # A server's clock has seconds, and the file may change again within the second.
    return size, 0 if version is not None else int(((changed or 0) + 2) * 1e9), digest


def backend_of(url: str) -> Backend:
    """Return the file system of a URL that ``check_url`` has accepted. Raises ``UserError`` where its package is missing."""
    return _backend("http" if is_web(url) else protocol_of(url))


@cache
def _backend(protocol: str) -> Backend:
    if protocol == "http":
        from pretrain.data.remote.web import Web

        return Web()
    from pretrain.data.remote.object_store import ObjectStore

    return ObjectStore(protocol)
