"""The units of a dataset, divided among all processes that tokenize it into the same cache, on one machine or on several. Each
unit has a lock. Its holder encodes the unit and then records the hashes of its pieces, by which all others find the part:

    next unit → is its part there, by a record of any process?    yes: take the part
                is its lock free?                                 no: come back to the unit later
                encode it, record it, release the lock

The lock of a process that died is free (`pretrain.runtime.locks`), and what it has recorded stays. So a start that was killed
continues with the units that have no record, without reading the others again."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.data.cache import cache_errors, cache_file
from pretrain.data.reading.units import FileRange, WorkUnit, key_of
from pretrain.data.store.token_shards import open_part
from pretrain.data.tokenization.encode import Encoder, Outcome, Progress
from pretrain.data.tokenization.files_record import is_young, recall
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import make_folder
from pretrain.runtime.locks import Busy, Lock

POLL_SECONDS = 0.2  # between two looks at the units that other processes hold


class UnitRecords:
    """Locks and records of the units, in a folder that is deleted when the dataset is complete.

    Args:
        folder: the folder.
        memory: the record of the whole dataset's files, which the process that completes it writes before it deletes the folder.
        started_at: when this process began to read files, in seconds since the epoch.
    """

    def __init__(self, folder: Path, memory: Path, started_at: float) -> None:
        self._folder, self._memory, self._started_at = folder, memory, started_at
        self._memory_seen = _changed_at(memory)
        self._completed: dict[
            FileRange, str
        ] = {}  # piece without digest → digest, from a memory that is newer than this start

    def lock(self, unit: WorkUnit) -> Lock | None:
        """Return the lock of ``unit``; ``None`` if another process, or another thread, holds it."""
        path = self._path(unit).with_suffix(".lock")
        with cache_errors(path.parent):
            try:
                make_folder(path.parent)
                return Lock(path).acquire(timeout=0)
            except (
                Busy,
                FileNotFoundError,
            ):  # not found: another process, for which the dataset is complete, deletes the folder
                return None

    def digests(self, unit: WorkUnit) -> list[str] | None:
        """Return the hashes of the unit's pieces, if a process has recorded them."""
        try:
            found = json.loads(self._path(unit).read_text())
            if isinstance(found, list) and len(found) == len(unit.pieces) and all(isinstance(x, str) for x in found):
                return found
        except (OSError, ValueError, RecursionError):
            pass
        if (changed := _changed_at(self._memory)) != self._memory_seen:
            self._memory_seen = changed
            pieces = (piece for of_file in recall(self._memory).values() for piece in of_file)
            self._completed = {replace(piece, digest=None): piece.digest for piece in pieces if piece.digest}
        known = [self._completed.get(replace(piece, digest=None)) for piece in unit.pieces] if self._completed else []
        return [digest for digest in known if digest] if known and all(known) else None

    def record(self, unit: WorkUnit, digests: list[str]) -> None:
        """Record the hashes of the unit's pieces, unless one of its files may have changed since without a new stamp."""
        if any(is_young(piece, self._started_at) for piece in unit.pieces):
            return
        try:
            with cache_file(self._path(unit)) as file:
                file.write(json.dumps(digests).encode())
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # as in `lock`
                raise

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, unit: WorkUnit) -> Path:
        key = key_of([[piece.path, piece.format, piece.start, piece.stop, *piece.stamp] for piece in unit.pieces])
        return self._folder / key[:2] / f"{key}.json"


@dataclass(frozen=True)
class Claim:
    """A unit that this process encodes, with its number in the dataset and its lock."""

    index: int
    unit: WorkUnit
    lock: Lock


class SharedWork:
    """The units that this process has taken or found, for all threads that encode them.

    Attributes:
        units: number → unit, of all units met so far.
        outcomes: number → outcome, of those that are encoded, by any process.
    """

    def __init__(
        self,
        units: Iterable[tuple[int, WorkUnit]],
        encoder: Encoder,
        records: UnitRecords,
        *,
        max_tokens: int | None = None,
        progress: Progress = lambda amount: None,
    ) -> None:
        """Take ``units`` (with their numbers) in order, and none that is not needed for the first ``max_tokens`` tokens."""
        self.units: dict[int, WorkUnit] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._fresh, self._any_fresh = iter(units), True
        self._held: deque[tuple[int, WorkUnit]] = deque()  # units that another process had when they were met
        self._encoder, self._records, self._progress = encoder, records, progress
        self._max_tokens = max_tokens
        self._tokens: dict[int, int] = {}  # with max_tokens: number → tokens of the part
        self._all_tokens = self._prefix = self._prefix_tokens = 0  # all; the parts from the first one without a gap
        self._stopped = False
        self._mutex = threading.Lock()

    def take(self) -> Claim | None:
        """Return the next unit to encode; wait while all that are left are held by other processes. ``None``: all are encoded, or
        enough of them, or ``stop`` was called."""
        met = 0  # held units in a row
        while (found := self._next()) is not None:
            index, unit = found
            if claim := self._claim(index, unit):
                return claim
            if index in self.outcomes:
                met = 0
                continue
            with self._mutex:
                self._held.append(found)
                met += 1
                all_held = not self._wants_fresh() and met >= len(self._held)
            if all_held:
                time.sleep(POLL_SECONDS)
                met = 0
        return None

    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Record the outcome of a claim and release its lock."""
        self._put(claim.index, outcome)
        self._records.record(claim.unit, outcome[1])
        claim.lock.release()

    def stop(self) -> None:
        """Let no thread take a further unit."""
        self._stopped = True

    def first(self) -> list[int]:
        """Return the numbers of the units, from the first one, that hold the first ``max_tokens`` tokens."""
        numbers, total = [], 0
        for number in range(self._prefix):
            if total >= (self._max_tokens or 0):
                break
            numbers.append(number)
            total += self._tokens[number]
        return numbers

    def _next(self) -> tuple[int, WorkUnit] | None:
        with self._mutex:
            if self._stopped or self._is_enough():
                return None
            if self._wants_fresh():
                if (found := next(self._fresh, None)) is not None:
                    self.units[found[0]] = found[1]
                    return found
                self._any_fresh = False
            return self._held.popleft() if self._held else None

    def _wants_fresh(self) -> bool:
        return self._any_fresh and (self._max_tokens is None or self._all_tokens < self._max_tokens)

    def _is_enough(self) -> bool:
        return self._max_tokens is not None and self._prefix_tokens >= self._max_tokens

    def _claim(self, index: int, unit: WorkUnit) -> Claim | None:
        if self._is_found(index, unit) or (lock := self._records.lock(unit)) is None:
            return None
        if self._is_found(index, unit):  # recorded before the lock was released
            lock.release()
            return None
        return Claim(index, unit, lock)

    def _is_found(self, index: int, unit: WorkUnit) -> bool:
        """Return whether the part of ``unit`` exists, and note it as the outcome."""
        outcome = self._encoder.finished(unit)
        if outcome is None and (digests := self._records.digests(unit)) is not None:
            known = (replace(piece, digest=digest) for piece, digest in zip(unit.pieces, digests, strict=True))
            outcome = self._encoder.finished(WorkUnit(tuple(known)))
        if outcome is None:
            return False
        self._put(index, outcome)
        self._progress(unit.size)
        return True

    def _put(self, index: int, outcome: Outcome) -> None:
        with self._mutex:
            self.outcomes[index] = outcome
            if self._max_tokens is None or index in self._tokens:
                return
            part = open_part(outcome[0])
            self._tokens[index] = part.num_tokens if part else 0
            self._all_tokens += self._tokens[index]
            while self._prefix in self._tokens:
                self._prefix_tokens += self._tokens[self._prefix]
                self._prefix += 1


def _changed_at(path: Path) -> int:
    with suppress(OSError):
        return os.stat(path).st_mtime_ns
    return 0
