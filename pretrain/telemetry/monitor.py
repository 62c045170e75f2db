"""Turns the loop's events into records and hands them to the sinks. It owns the clocks; nothing of it is saved.

Losses and norms stay on the device until a log step: reading them is the only time the monitor waits for the device.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.console import notice
from pretrain.events import Evaluated, Event, Exported, RolledBack, RunFinished, RunStarted, Saved, StepDone
from pretrain.progress import Every
from pretrain.telemetry.record import Record, fields_of, json_safe

if TYPE_CHECKING:
    from pretrain.telemetry.sink import Sink


class Monitor:
    """A listener. ``log_every`` in steps; the first and the last step of a run are always logged."""

    def __init__(self, sinks: dict[str, Sink], *, run: Path, log_every: int) -> None:
        self._sinks = dict(sinks)
        self._run = run
        self._every = Every(log_every)
        self._window = _Window()
        self._run_seconds = 0.0
        self._run_tokens = 0
        self._total_steps = 0
        self._first_logged = False
        self._started = False
        self._unsaved: list[Record] = []

    def unsaved(self) -> list[Record]:
        """The records that no whole checkpoint has brought into safety yet."""
        return list(self._unsaved)

    def __call__(self, event: Event) -> None:
        match event:
            case StepDone():
                self._step(event)
            case Evaluated():
                for s in event.scores:
                    self._write_beside("evaluation", event.step, fields_of(s))
                self._window.exclude(event.seconds)
            case Saved():
                self._write_beside("checkpoint", event.step, fields_of(event) | {"path": str(event.path)})
                self._window.exclude(event.blocked_seconds)
                self._unsaved = [r for r in self._unsaved if r["step"] > event.step]
            case Exported():
                self._window.exclude(event.seconds)
            case RolledBack():
                self._go_back(event)
            case RunStarted():
                self._start(event)
            case RunFinished():
                self._finish(event)

    def _start(self, event: RunStarted) -> None:
        self._started = True
        self._unsaved = list(event.records)
        self._total_steps = event.total_steps
        self._each(lambda s: s.open(self._run, event))
        self._write(
            "run_started", event.step, {"total_steps": event.total_steps, "resumed": event.resumed} | event.facts
        )
        self._window.restart()

    def _go_back(self, event: RolledBack) -> None:
        """For the sinks as if the run had been stopped and resumed there."""
        self._each(lambda s: s.close())
        self._unsaved = [r for r in self._unsaved if r["step"] <= event.step]
        again = RunStarted(event.step, self._total_steps, resumed=True)
        self._each(lambda s: s.open(self._run, again))
        self._write("rollback", event.step, fields_of(event))
        self._window.restart()

    def _step(self, event: StepDone) -> None:
        window = self._window
        window.add(event)
        if self._first_logged and not self._every.due(event.step) and event.step != self._total_steps:
            return
        self._first_logged = True
        loss, grad_norm, skipped = (
            float(event.loss),
            float(event.grad_norm),
            int(event.skipped),
        )  # the device syncs here
        seconds = window.seconds()
        self._run_seconds += seconds
        self._run_tokens += window.tokens
        record = {
            "epoch": event.epoch,
            "tokens": event.tokens,
            "loss": loss,
            "lr": event.lr,
            "grad_norm": grad_norm,
            "step_seconds": seconds / window.steps,
            "data_seconds": window.data_seconds / window.steps,
            "tokens_per_second": window.tokens / seconds if seconds > 0 else None,
            "mfu": None,  # the table of device peaks is not there yet; null is the contract's word for unknown
            "memory_gib": peak_memory_gib(event.loss.device.type),
            "skipped_steps": skipped,
        }
        self._write("train", event.step, record)
        window.restart()

    def _finish(self, event: RunFinished) -> None:
        if not self._started:
            return
        speed = self._run_tokens / self._run_seconds if self._run_seconds > 0 else None
        fields = {
            "status": event.status,
            "tokens": event.tokens,
            "train_seconds": self._run_seconds,
            "tokens_per_second": speed,
            "model": str(event.model) if event.model else None,
            "folder": str(self._run),
        }
        self._write("run_finished", event.step, fields)
        self._each(lambda s: s.close())

    def _write_beside(self, kind: str, step: int, fields: Record) -> None:
        """Write what is no part of training; nor are the seconds that sinks take for it (a report's pictures)."""
        started_at = time.perf_counter()
        self._write(kind, step, fields)
        self._window.exclude(time.perf_counter() - started_at)

    def _write(self, kind: str, step: int, fields: Record) -> None:
        record = {"event": kind, "step": step, "time": time.time()} | json_safe(fields)
        self._unsaved.append(record)
        self._each(lambda s: s.write(record))

    def _each(self, call: Callable[[Sink], None]) -> None:
        """A sink that fails is dropped with one line; numbers are worth less than the run."""
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:
                del self._sinks[name]
                notice(f"sink {name} stopped: {type(error).__name__}: {error}; the run goes on without it")


class _Window:
    """Steps, tokens and training time since the last log step; evaluation and saving are not training time."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.data_seconds = 0.0
        self._excluded = 0.0
        self._started_at = time.perf_counter()

    def add(self, event: StepDone) -> None:
        self.steps += 1
        self.tokens += event.step_tokens
        self.data_seconds += event.data_seconds

    def exclude(self, seconds: float) -> None:
        self._excluded += seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._started_at - self._excluded


def peak_memory_gib(device_type: str) -> float:
    """Peak memory so far in GiB: allocated on the GPU, or resident on the host where there is none."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
