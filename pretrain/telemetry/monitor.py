"""The monitor turns the loop's events into records and passes them to the sinks.

Losses, norms and times stay on the device until a log step; only there does the monitor synchronise with the device. Of the
monitor's state a checkpoint saves only the latest records. docs/monitoring.md defines every number.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.runtime.console import notice
from pretrain.runtime.errors import one_line
from pretrain.runtime.files import DISK_FULL
from pretrain.runtime.memory import resident_bytes
from pretrain.telemetry.events import (
    DataStatisticsEvent,
    Evaluated,
    Event,
    LayerNorms,
    MergeCurve,
    MetricsEvent,
    RolledBack,
    RunFinished,
    RunStarted,
    Sampled,
    Saved,
    StepDone,
    TrainingPaused,
)
from pretrain.telemetry.goodput import Goodput
from pretrain.telemetry.history import History
from pretrain.telemetry.interval import Interval
from pretrain.telemetry.record import Record, fields_of, json_safe
from pretrain.telemetry.sinks.jsonl import records_until
from pretrain.telemetry.window import Total, Window

if TYPE_CHECKING:
    from pretrain.telemetry.sinks.base import Sink


NORMS = ("weight_norm", "grad_norm", "update_norm", "update_ratio")  # the columns of `LayerNorms.norms`
MAX_UNSAVED = 1_000  # records that a checkpoint saves at most; metrics.jsonl normally has them too


class Monitor:
    """A listener that writes records to ``sinks``. ``log_every`` is in steps; the first and the last step of a run are
    always logged."""

    def __init__(self, sinks: dict[str, Sink], *, run: Path, log_every: int) -> None:
        self._sinks = dict(sinks)
        self._full_disk_reported: set[str] = set()  # names of sinks whose full disk was reported
        self._run = run
        self._every = Interval(log_every)
        self._window = Window()
        self._total = Total()
        self.history = History()
        self._goodput = Goodput(run)
        self._facts: Record = {}
        self._layers: list[tuple[int, LayerNorms]] = []
        self._last: StepDone | None = None
        self._paced_from: tuple[int, float] | None = None
        self._total_steps = 0
        self._logged = False
        self._started = False
        self._unsaved: deque[Record] = deque(maxlen=MAX_UNSAVED)

    def unsaved(self) -> list[Record]:
        """Return the latest records that no complete checkpoint has saved yet."""
        return list(self._unsaved)

    def _keep_unsaved(self, holds: Callable[[Record], bool]) -> None:
        self._unsaved = deque(filter(holds, self._unsaved), maxlen=MAX_UNSAVED)

    def __call__(self, event: Event) -> None:
        match event:
            case StepDone():
                self._step(event)
            case Evaluated():
                self._write_layers()
                for s in event.scores:
                    self._write_untimed("evaluation", event.step, fields_of(s))
                for s in event.scores:
                    if s.positions is not None:
                        whose = {"domain": s.domain, "role": s.role, "digest": s.digest}
                        self._write_untimed("positions", event.step, whose | fields_of(s.positions))
                self._window.exclude(event.seconds)
            case MetricsEvent():
                for metric in event.metrics:
                    self._write_untimed("metric", event.step, fields_of(metric))
                self._window.exclude(event.seconds)
            case MergeCurve():
                exported = (None, 1) if event.chosen is None else (event.chosen.checkpoint, event.chosen.alpha)
                for point in event.points:
                    is_chosen = (point.checkpoint, point.alpha) == exported
                    own = {"alpha": point.alpha, "checkpoint": point.checkpoint, "chosen": is_chosen}
                    for s in point.scores:
                        self._write_untimed("merge", event.step, own | fields_of(s))
            case Sampled():
                for sample in event.samples:
                    self._write_untimed("sample", event.step, fields_of(sample))
                self._window.exclude(event.seconds)
            case Saved():
                self._keep_unsaved(lambda r: r["step"] > event.step)
                self._write_untimed("checkpoint", event.step, fields_of(event) | {"path": str(event.path)})
            case TrainingPaused():
                self._window.exclude(event.seconds, event.for_)
            case DataStatisticsEvent():
                self._write_untimed("data", event.step, data_fields(event))
                self._window.exclude(event.seconds)
            case RolledBack():
                self._go_back(event)
            case RunStarted():
                self._start(event)
            case RunFinished():
                self._finish(event)

    def _start(self, event: RunStarted) -> None:
        self._started = True
        self._unsaved.extend(event.records)
        self._total_steps = event.total_steps
        self._facts = event.facts
        self._open_sinks(event)
        self._goodput.start(event, self.history)
        self._write(
            "run_started", event.step, {"total_steps": event.total_steps, "resumed": event.resumed} | event.facts
        )
        self._window.restart()

    def _go_back(self, event: RolledBack) -> None:
        """Close and reopen the sinks, as if the run had been stopped and resumed at ``event.step``."""
        self._call_sinks(lambda s: s.close())
        self._keep_unsaved(lambda r: r["step"] <= event.step)
        again = RunStarted(event.step, self._total_steps, resumed=True, records=tuple(self._unsaved))
        self._open_sinks(again)
        self._write("rollback", event.step, fields_of(event))
        self._layers.clear()
        self._paced_from = self._last = None
        self._window.restart()

    def _open_sinks(self, start: RunStarted) -> None:
        """Restore the history up to ``start.step``, then open the sinks. The history is read before, because opening a sink
        truncates its file."""
        self.history = history_until(self._run, start, self.history)
        start = replace(start, history=self.history)
        self._call_sinks(lambda s: s.open(self._run, start))

    def _step(self, event: StepDone) -> None:
        self._window.add(event)
        if event.layers is not None:
            self._layers.append((event.step, event.layers))
        self._last = event
        if self._logged and not self._every.due(event.step) and event.step != self._total_steps:
            return
        self._log(event)

    def _log(self, event: StepDone) -> None:
        """Write the norms of the layers recorded in this window, then the record of the window, which ends with
        ``event``."""
        window, facts = self._window, self._facts
        numbers = window.numbers(event)  # this synchronises with the device, so the clock is read after it
        seconds = window.seconds()
        self._logged = True
        self._total.add(window, seconds)
        record = {
            "epoch": event.epoch,
            "tokens": event.tokens,
            "lr": event.lr,
            "step_seconds": seconds / window.steps,
            **numbers,
            **window.split(),
            **speed(window.tokens, window.samples, seconds, facts),
            "tokens_per_second_run": self._total.tokens / self._total.seconds if self._total.seconds > 0 else None,
            **memory_gib(event.loss.device.type),
            "eta_seconds": self._eta_seconds(event.step),
            "goodput": self._goodput.share(self.history.trained_seconds + seconds),
        }
        if facts.get("devices", 1) > facts.get(
            "world_size", 1
        ):  # `dp` communicates inside the step, where it can't be timed
            record["communication_seconds"] = None
        window.restart()
        self._write_layers()
        self._write("train", event.step, record)

    def _write_layers(self) -> None:
        """Write the pending layer norms. Do this before any record of a later step: W&B rejects a row of an earlier
        step."""
        for step, layers in self._layers:
            rows = zip(layers.names, layers.norms.tolist(), strict=True)
            self._write("layers", step, {"layers": {name: dict(zip(NORMS, row, strict=True)) for name, row in rows}})
        self._layers.clear()

    def _eta_seconds(self, step: int) -> float | None:
        """Estimate the remaining seconds from the pace since the first log step of this start, including evaluations and
        checkpoints."""
        if self._paced_from is None:
            self._paced_from = (step, time.perf_counter())
            return 0.0 if step >= self._total_steps else None
        first_step, first_at = self._paced_from
        pace = (time.perf_counter() - first_at) / max(1, step - first_step)
        return pace * max(0, self._total_steps - step)

    def summary(self) -> Record:
        """Return the numbers of the whole run: the speed since this start, the goodput since the first one, ``results``, the
        last scores of each domain, and ``metrics``, the last value of each metric."""
        return self._totals() | {"results": self.history.results, "metrics": self.history.measurements}

    def _totals(self) -> Record:
        """Return the speed since this start and the goodput since the first one."""
        rates = speed(self._total.tokens, self._total.samples, self._total.seconds, self._facts)
        shown = ("tokens_per_second", "model_flops_per_second", "mfu")
        return {
            **({} if self._last is None else {"tokens": self._last.tokens}),
            "train_seconds": self._total.train_seconds,
            **{name: rates[name] for name in shown},
            "goodput": self._goodput.share(self.history.trained_seconds) if self._total_steps else None,
        }

    def _finish(self, event: RunFinished) -> None:
        if not self._started:
            return
        if event.status == "stopped" and self._last is not None and self._window.steps:
            self._log(self._last)
        fields = {
            "status": event.status,
            **self._totals(),
            "tokens": event.tokens,
            "model": str(event.model) if event.model else None,
            "folder": str(self._run),
            **({"stopped_by": event.stopped_by} if event.stopped_by else {}),
        }
        self._write("run_finished", event.step, fields)
        self._call_sinks(lambda s: s.close())

    def _write_untimed(self, kind: str, step: int, fields: Record) -> None:
        """Write a record that is not of training, and exclude the seconds the sinks take for it (such as drawing a report)
        from the training time."""
        started_at = time.perf_counter()
        self._write(kind, step, fields)
        self._window.exclude(time.perf_counter() - started_at)

    def _write(self, kind: str, step: int, fields: Record) -> None:
        record = {"event": kind, "step": step, "time": time.time()} | json_safe(fields)
        self._unsaved.append(record)
        self.history.add(record)
        self._call_sinks(lambda s: s.write(record), keep_if_full=True)

    def _call_sinks(self, call: Callable[[Sink], None], *, keep_if_full: bool = False) -> None:
        """Call ``call`` with every sink. A sink that raises is dropped with one notice, so that it does not stop the run.
        With ``keep_if_full`` a sink that raises because the disk is full is kept, because space may be freed later."""
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:
                if keep_if_full and isinstance(error, OSError) and error.errno in DISK_FULL:
                    if name not in self._full_disk_reported:
                        notice(f"sink {name}: {error.strerror}; writing is retried with the next record")
                    self._full_disk_reported.add(name)
                    continue
                del self._sinks[name]
                with suppress(Exception):  # a live bar has hidden the cursor; closing restores it
                    sink.close()
                notice(
                    f"sink {name} stopped: {type(error).__name__}: {one_line(error, lines=None)}; the run continues without it"
                )


def history_until(run: Path, start: RunStarted, known: History) -> History:
    """Return the history of the records up to ``start.step``. It is read from metrics.jsonl; without that file, a rollback cuts
    the history that is ``known``, and a resumed run has the records that were saved with its checkpoint."""
    file = run / "metrics.jsonl"
    if start.step == 0 or (known.last and not file.exists()):
        known.cut(start.step)
        return known
    try:
        records = records_until(file, start)
    except OSError:  # the sink that appends to the file reports it
        records = list(start.records)
    return History(records, on_invalid=lambda number, error: _report_invalid(file, number, error))


def _report_invalid(file: Path, number: int, error: Exception) -> None:
    notice(f"{file}: record {number} can't be read: {type(error).__name__}: {error}; it is left out")


def data_fields(event: DataStatisticsEvent) -> Record:
    """Return the fields of a ``data`` record."""
    tokens, documents = (sum(getattr(s, name) for s in event.sources.values()) for name in ("tokens", "documents"))
    return {
        "tokens_per_document": tokens / documents if documents else None,
        "sources": {
            n: {**fields_of(s), "share": s.tokens / tokens if tokens else None} for n, s in event.sources.items()
        },
        "parts": {name: fields_of(part) for name, part in event.parts.items()},
    }


def speed(tokens: int, samples: int, seconds: float, facts: Record) -> Record:
    """Return the rates of ``tokens`` and ``samples`` (summed over all devices) in ``seconds``. ``facts`` is the run's
    metadata; a rate that needs a missing fact is null."""
    devices, length = facts.get("devices", 1), facts.get("sequence_length")
    flops, peak = facts.get("flops_per_token"), facts.get("peak_flops")
    seconds = seconds if seconds > 0 else math.nan
    model_flops = samples * length * flops / seconds / devices if flops and length else None
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_device": tokens / seconds / devices,
        "samples_per_second": samples / seconds,
        "model_flops_per_second": model_flops,
        "mfu": model_flops / peak if model_flops is not None and peak else None,
    }


def memory_gib(device_type: str) -> Record:
    """Return the memory of this process in GiB.

    ``memory_gib`` is the peak so far: allocated on the GPU, or resident on the host where there is no GPU.
    ``memory_reserved_gib`` is the peak that the GPU's allocator has reserved. ``host_memory_gib`` is resident now."""
    resident = resident_bytes()
    host = {"host_memory_gib": None if resident is None else resident / 2**30}
    if device_type == "cuda":
        import torch

        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"memory_gib": peak / 2**30, "memory_reserved_gib": reserved / 2**30} | host
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory_gib": peak / 2**30, "memory_reserved_gib": None} | host
