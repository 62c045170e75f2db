"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to stop: the step is finished, the state saved, and the exit code is 75."""

from __future__ import annotations

import os
import signal
from types import FrameType

from pretrain.console import notice

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try the same command again


class Interrupt:
    """``requested`` turns true at the first signal; a second Ctrl-C leaves at once, the last checkpoint stays good.

    ``patient`` is false while there is nothing to finish (reading data, building the model): then the first signal
    raises ``Stopped`` where the program stands.
    """

    def __init__(self) -> None:
        self.requested = False
        self.patient = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested and number == signal.SIGINT:
            os._exit(128 + number)
        if self.requested:
            return
        self.requested = True
        if not self.patient:
            raise Stopped(name)
        notice(f"{name}: finishing this step, then saving; Ctrl-C again leaves at once")


class Stopped(BaseException):
    """A signal came before there was anything to save. The same command starts where it was."""
