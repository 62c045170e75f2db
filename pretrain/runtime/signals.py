"""Stop signals: after Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP (a closed terminal) a run finishes its step, saves its state and exits
with code 75."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain.runtime.console import notice

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it: the run outlives its terminal
    SIGNALS += (signal.SIGHUP,)
ONE_CTRL_C_SECONDS = 1.0  # under torchrun a single Ctrl-C arrives twice, from the terminal and from torchrun
IMPORT_SECONDS = 0.05  # delay after which a signal that arrived during an import is sent again
# The longest wait without a check: a signal that another thread has received (after SIGCONT) does not wake the waiting thread.
SIGNAL_POLL_SECONDS = 0.1
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try the same command again


class Interrupt:
    """The handler of stop signals. ``requested`` becomes true at the first signal. A second Ctrl-C exits immediately; the last
    checkpoint stays valid.

    ``defer_signals`` is false while there is nothing to finish (reading data, building the model). Then the first signal
    raises ``Stopped`` at once.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.requested = False
        self.defer_signals = False
        self._silent = silent
        self._requested_at = 0.0

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._requested_at > ONE_CTRL_C_SECONDS:
                os._exit(128 + number)
            return
        if not self.defer_signals and importing(frame):
            threading.Timer(IMPORT_SECONDS, os.kill, (os.getpid(), number)).start()
            return
        self.requested, self._requested_at = True, time.monotonic()
        if not self.defer_signals:
            raise Stopped(name)
        if not self._silent:
            notice(f"{name}: finishing this step, then saving; Ctrl-C again exits immediately")


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block stop signals inside. Processes that are started inside inherit this, and never receive one unless they unblock
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def importing(frame: FrameType | None) -> bool:
    """Return whether ``frame`` is inside an import. An interrupted import (numpy's, torch's) can't be repeated, and a second
    attempt would raise an error that hides why the program ends."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class Stopped(BaseException):
    """A signal arrived before there was anything to save. The same command starts again from there."""
