"""Mutual exclusion of processes by the kernel's lock on a file, which the kernel frees when its holder ends for any reason.

Some file systems have no such lock (ENOSYS, ENOLCK: NFS without its lock daemon, some FUSE, CIFS). There a claim file is
used, which only one process can create. It names its holder. A holder on this machine is alive if its process is; a holder on
another machine renews the modification time of the file. (`filelock` 4.2 has a fallback for ENOSYS only.)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from pretrain.runtime.filesystem import CANNOT

BUSY = {errno.EAGAIN, errno.EACCES}
NO_LOCKS = CANNOT | {errno.ENOLCK}
POLL_SECONDS = 0.01
RENEW_SECONDS = 10.0
STALE_SECONDS = 120.0  # a claim of another machine that was not renewed for so long is stale


class Busy(OSError):
    """Another process holds the lock."""


class Lock:
    """An exclusive lock on the file ``path``, which is created and not deleted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._claim: Path | None = None  # the claim file, if the kernel has no lock
        self._released = threading.Event()

    def acquire(self, timeout: float | None = None) -> Lock:
        """Acquire the lock within ``timeout`` seconds (``None``: no limit). Raises ``Busy`` and ``OSError``."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._try():
            if until is not None and time.monotonic() >= until:
                raise Busy(errno.EAGAIN, "held by another process", str(self.path))
            time.sleep(POLL_SECONDS)
        return self

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The file descriptors that a child process must inherit to hold the lock too."""
        return () if self._file is None else (self._file,)

    def moved(self, path: Path) -> None:
        """Set the file to ``path``, after its folder was renamed."""
        self.path = path
        if self._claim is not None:
            self._claim = _claim_of(path)

    def release(self) -> None:
        """Release the lock. A child process that has inherited it still holds it."""
        self._released.set()
        if self._claim is not None:
            with suppress(OSError):
                self._claim.unlink()
            self._claim = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        """Free the kernel's lock. A claim file stays, because this process may be a fork of the one that created it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if error.errno in BUSY:
                return False
            if error.errno not in NO_LOCKS:
                raise
            return self._try_to_claim()
        if not _is_at(self.path, file):  # its holder has moved the file between open and flock
            os.close(file)
            return False
        self._file = file
        return True

    # -- without the kernel's lock -------------------------------------------------------------------------------------

    def _try_to_claim(self) -> bool:
        claim = _claim_of(self.path)
        if (holder := _read(claim)) is not None:
            if _is_alive(holder, claim):
                return False
            _remove_claim(claim, holder)
        try:
            file = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(file, "w", encoding="utf-8") as made:
                json.dump(_this_process(), made)
        except OSError:  # a full disk: no process would renew the claim, and others would wait for it
            claim.unlink(missing_ok=True)
            raise
        self._claim = claim
        self._released.clear()
        threading.Thread(target=self._renew, args=(claim,), name="lock", daemon=True).start()
        return True

    def _renew(self, claim: Path) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with suppress(OSError):
                os.utime(claim)


def hold_shared(path: Path) -> int | None:
    """Return a descriptor that holds a shared lock on a file as long as it is open. It is waited for a process inside ``alone``.
    ``None`` where there is no such file, or the file system has no locks."""
    while True:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            os.close(file)
            return None
        if _is_at(path, file):
            return file
        os.close(file)  # the process that had it has deleted the file


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file and yield true; false if another process holds a lock, or this can't be known, or there
    is no such file."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = _is_at(path, file)
        except OSError:
            is_mine = False
        yield is_mine
    finally:
        os.close(file)


def is_held(path: Path) -> bool:
    """Return whether a process holds a lock on a file, or this can't be known."""
    with alone(path) as is_mine:
        return not is_mine and os.path.lexists(path)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _claim_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


def _read(claim: Path) -> dict[str, Any] | None:
    """Return the holder of a claim, or ``None`` if there is no claim. It is empty if the claim is incomplete or being written."""
    try:
        holder = json.loads(claim.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, Any], claim: Path) -> bool:
    if (holder.get("host"), holder.get("boot")) == (os.uname().nodename, _boot()):
        return _started(holder.get("pid")) == holder.get("started")
    return not _is_stale(claim)


def _is_stale(claim: Path) -> bool:
    """Return whether a claim was not renewed in time, by the clock of the file system, which may be another machine's."""
    with suppress(OSError), NamedTemporaryFile(prefix=f"{claim.name}.", dir=claim.parent) as now:
        return os.fstat(now.fileno()).st_mtime - claim.stat().st_mtime > STALE_SECONDS
    return False


def _remove_claim(claim: Path, holder: dict[str, Any]) -> None:
    """Remove the claim of a dead ``holder``. If another process has replaced it in the meantime, that claim is restored."""
    away = claim.with_name(f"{claim.name}.dead-{os.getpid()}")
    with suppress(OSError):
        os.rename(claim, away)
        if _read(away) == holder:
            away.unlink()
        else:
            os.rename(away, claim)


def _this_process() -> dict[str, Any]:
    return {"host": os.uname().nodename, "boot": _boot(), "pid": os.getpid(), "started": _started(os.getpid())}


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """Return when a process of this machine was started, in clock ticks after boot (see proc(5)); ``None`` if it does not run."""
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError, ValueError):
        return None
    fields = state.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
