"""Detection of a stalled run: the watchdog ends the process and writes the stacks of all its threads to its log.

The usual limit applies to work that is never slow: a micro-batch, a batch of an evaluation, the loader, writing to sinks. A
longer limit applies to slow work: the first batch (which compiles), resuming, exporting, building the model. A heartbeat
costs two assignments.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from pretrain.runtime.files import open_append
from pretrain.runtime.streams import flush

# A tick counts as the time that it took, but at most as two ticks: time in which the whole process was stopped (Ctrl-Z, a
# suspended job) or the machine was asleep is not a hang. Each rank has two ticks to detect a hang by itself, so that all
# ranks exit together before the earliest time at which a collective could time out.
TICKS = 100
STALLED_TICKS = 96


class Watchdog:
    """Ends the process if it makes no progress, inside ``guarding``.

    ``heartbeat`` reports progress. After ``allow_slow`` the longer limit applies until the next heartbeat, and inside
    ``slow`` it applies throughout. ``guarding`` starts with the longer limit.
    """

    def __init__(self) -> None:
        self._heartbeats = 0
        self._slow_allowed = True
        self._slow_blocks = 0

    def heartbeat(self) -> None:
        self._heartbeats += 1
        self._slow_allowed = False

    def allow_slow(self) -> None:
        self._slow_allowed = True

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Inside, the longer limit applies, and no heartbeat ends that."""
        self._slow_blocks += 1
        try:
            yield
        finally:
            self.heartbeat()
            self._slow_blocks -= 1

    @contextmanager
    def guarding(
        self, timeout: float, slow_timeout: float, *, log: Path, report: Callable[[str, str], None]
    ) -> Iterator[None]:
        """Inside, this process exits with 1 after ``timeout`` seconds without a heartbeat, or ``slow_timeout`` while slow work
        is allowed. Before that, ``report(place, how_long)`` is called with the function in which it is stalled.

        SIGUSR2 writes the stacks to ``log`` at any time.
        """
        finished = threading.Event()
        with open_append(log, mode="a") as file:
            faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
            thread = threading.Thread(
                target=self._watch, args=(timeout, slow_timeout, file, report, finished), name="watchdog", daemon=True
            )
            thread.start()
            try:
                yield
            finally:
                finished.set()
                thread.join()
                faulthandler.unregister(signal.SIGUSR2)

    def _watch(
        self,
        timeout: float,
        slow_timeout: float,
        log: IO[str],
        report: Callable[[str, str], None],
        finished: threading.Event,
    ) -> None:
        tick = timeout / TICKS
        seen, stalled, last_tick = self._heartbeats, 0.0, time.monotonic()
        while not finished.wait(tick):
            passed, last_tick = time.monotonic() - last_tick, time.monotonic()
            # Read before the heartbeats, because `slow` ends after its heartbeat.
            is_slow = self._slow_allowed or self._slow_blocks
            stalled = 0 if self._heartbeats != seen else stalled + min(passed, 2 * tick)
            seen = self._heartbeats
            limit, key = (slow_timeout, "launch.slow_timeout") if is_slow else (timeout, "launch.timeout")
            if stalled >= STALLED_TICKS / TICKS * limit:
                how_long = f"no progress for {limit:g} s ({key})"
                # The disk of the log may itself be the cause of the hang, so nothing waits for the log.
                threading.Thread(target=_dump, args=(log, how_long), daemon=True).start()
                report(place_of(sys._current_frames()[threading.main_thread().ident or 0]), how_long)
                time.sleep(2 * tick)
                flush()
                os._exit(1)


def place_of(frame: FrameType) -> str:
    """Return the innermost function of this project in a stack, such as ``world.py:48 sum``, followed by the innermost function
    of all if that belongs to another package."""
    package = str(Path(__file__).parents[1]) + os.sep
    stack = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_stack(frame)]
    own = next((entry for entry in stack if entry[0].startswith(package)), stack[0])
    where = f"{own[0].removeprefix(package)}:{own[1]} {own[2]}"
    return where if stack[0] == own else f"{where} ({Path(stack[0][0]).name}:{stack[0][1]} {stack[0][2]})"


def _dump(log: IO[str], how_long: str) -> None:
    with suppress(OSError, ValueError):
        log.write(f"{how_long}; the stacks of all threads:\n")
        log.flush()
        faulthandler.dump_traceback(log, all_threads=True)
