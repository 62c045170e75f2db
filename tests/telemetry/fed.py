"""A sink without the monitor."""

from dataclasses import replace

from pretrain.telemetry.history import History
from pretrain.telemetry.monitor import history_until


class Fed:
    """A sink with the history of its records, as the monitor gives it to all sinks."""

    def __init__(self, sink):
        self.sink, self.history = sink, History()

    def open(self, run, start):
        self.history = history_until(run, start, self.history)
        self.sink.open(run, replace(start, history=self.history))

    def write(self, record):
        self.history.add(record)
        self.sink.write(record)

    def close(self):
        self.sink.close()
