"""A sink without the monitor."""

from dataclasses import replace

import torch

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


class CountedReads(torch.Tensor):
    """A tensor that counts how often Python reads its value, which is what makes a GPU wait."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu"):
            CountedReads.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})
