"""A sink that sends its own process a signal at a certain record: a stop signal exactly when the test wants it."""

import os
import signal


class Stopper:
    def __init__(self, event: str, at: int, number: int = signal.SIGTERM) -> None:
        self.at, self.number = (event, at), number

    def open(self, run, start):
        self.resumed = start.resumed

    def write(self, record):
        if not self.resumed and (record["event"], record["step"]) == self.at:
            os.kill(os.getpid(), self.number)

    def close(self):
        pass
