"""A sink that sends its own process a signal at a certain record: a stop signal exactly when the test wants it."""

import os
import signal


class Stopper:
    def __init__(self, event: str, at: int, number: int = signal.SIGTERM, resumed_too: bool = False) -> None:
        self.at, self.number, self.resumed_too = (event, at), number, resumed_too

    def open(self, run, start):
        self.resumed = start.resumed and not self.resumed_too

    def write(self, record):
        if not self.resumed and (record["event"], record["step"]) == self.at:
            os.kill(os.getpid(), self.number)

    def close(self):
        pass
