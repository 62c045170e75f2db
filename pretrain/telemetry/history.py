"""The aggregate of a run's records: run.json, the console, the report, the table of a sweep and `RunResult` take their numbers
from it.

`Window` makes the numbers of one train record from the steps of that record; everything that needs more than one record is here.
The size is bounded: curves are thinned, and of the windows of steps only two numbers each are kept.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.telemetry.curves import Curves
from pretrain.telemetry.numbers import is_number
from pretrain.telemetry.record import STEP_PARTS, WINDOW_PARTS, Record, change_of, metric_key, scored_before

MAX_CHECKPOINTS = 12  # the last checkpoints that are listed
MAX_EVENTS = 200  # starts and rollbacks that are listed
MAX_LOSSES = 100  # log steps whose loss is kept: the curve on a terminal shows one per column

PARTS = (*STEP_PARTS, *WINDOW_PARTS, "other")
INVALID = (KeyError, ValueError, TypeError, AttributeError)  # what `History.add` raises for a record that lacks a field


@dataclass
class Domain:
    """The scores of one domain. ``last`` is the last evaluation, ``first`` that of the base model (before training) on the
    same text."""

    role: str
    first: Record
    last: Record
    scores: Curves = field(default_factory=lambda: Curves(200))

    @property
    def once(self) -> bool:
        """Return whether the domain has been scored only once, so that no change can be computed."""
        return len(self.scores.steps) == 1

    @property
    def before_only(self) -> bool:
        """Return whether the domain has not been scored since step 0."""
        return bool(self.last["step"] == 0)

    def curve(self, key: str) -> tuple[list[int], list[float | None]]:
        """Return steps and values. Even if the curve is thinned, its ends are the exact first and last scores."""
        steps, values = self.scores.steps, self.scores.mean(key)
        if self.scores.width == 1 or not steps:
            return steps, values
        ends = (value if is_number(value := record.get(key)) else None for record in (self.first, self.last))
        first, last = ends
        return [self.first["step"], *steps], [first, *values[:-1], last]

    def change(self) -> float | None:
        """Return the change of the loss since step 0 in nats per token, or ``None`` if it is unknown."""
        delta = change_of(self.last)
        return delta if is_number(delta) else None


@dataclass
class Measurement:
    """The values of one metric of an evaluation task: the first record, the last one, and the curve of ``value``."""

    first: Record
    last: Record
    values: Curves = field(default_factory=lambda: Curves(200))


class History:
    """The history of a run. Records are added in order, from a file or while the run writes them.

    ``on_invalid`` is called for each of ``records`` that lacks a required field of its event; without it, the exception is
    raised (one of ``INVALID``).

    Attributes:
        train: Curves of the train records.
        last_train: Last train record.
        num_train: Number of train records.
        losses: (step, loss or None) of the last train records: the mean over the record's steps, if the record has it.
        domains: Scores by domain.
        measured: Metrics of evaluation tasks by `metric_key`.
        merge: Scores of the points between the base model and the result: by the step of the checkpoint that stands for the
            result (``None``: the result itself) and ``alpha``, then by domain.
        layers: Curves of the norms by layer.
        samples: First and last sample by domain and prompt.
        positions: First and last losses by position, by domain.
        data: Last ``data`` record.
        checkpoints: Last checkpoint records.
        num_checkpoints: Number of checkpoint records.
        run_events: Last starts, rollbacks and ends.
        first: First record.
        start: Last ``run_started`` record.
        end: ``run_finished`` record of the last start, if it exists.
        last: Step and time of the last record.
        seconds: Total seconds by part.
        memory_gib: Peak memory in GiB by kind.
        trained_seconds: Seconds of the training steps that were kept. A window that a rollback cuts in its middle does not
            count, nor does one whose first step is unknown because the records before it are missing. NaN if a record does
            not have its seconds.
    """

    def __init__(
        self, records: Iterable[Record] = (), *, on_invalid: Callable[[int, Exception], None] | None = None
    ) -> None:
        self.train = Curves()
        self.last_train: Record = {}
        self.num_train = 0
        self.losses: deque[tuple[int, float | None]] = deque(maxlen=MAX_LOSSES)
        self.domains: dict[str, Domain] = {}
        self.measured: dict[str, Measurement] = {}
        self.merge: dict[tuple[int | None, float], dict[str, Record]] = {}
        self.layers: dict[str, Curves] = {}
        self.samples: dict[tuple[str, str], list[Record]] = {}  # key: domain, prompt; value: first and last
        self.positions: dict[str, list[Record]] = {}  # by domain; value: first and last
        self.data: Record = {}
        self.checkpoints: deque[Record] = deque(maxlen=MAX_CHECKPOINTS)
        self.num_checkpoints = 0
        self.run_events: deque[Record] = deque(maxlen=MAX_EVENTS)
        self.first: Record = {}
        self.start: Record = {}
        self.end: Record | None = None
        self.last: Record = {}
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.memory_gib: dict[str, float] = {}
        self._counted: int | None = None  # the step up to which seconds are counted; unknown before the first record
        self._window_steps, self._window_seconds = array("q"), array("d")  # last step and seconds of every window
        self.trained_seconds = 0.0
        for number, record in enumerate(records, start=1):
            try:
                self.add(record)
            except INVALID as error:
                if on_invalid is None:
                    raise
                on_invalid(number, error)

    @property
    def step(self) -> int:
        """Return the step of the last record."""
        return int(self.last.get("step", 0))

    def add(self, record: Record) -> None:
        """Add the next record of the run."""
        match record["event"]:
            case "train":
                self._train(record)
            case "evaluation":
                self._evaluation(record)
            case "metric":
                measurement = self.measured.setdefault(metric_key(record), Measurement(record, record))
                measurement.last = record
                measurement.values.add(record["step"], {"value": record["value"]})
            case "merge":
                place = (record.get("checkpoint"), record["alpha"])
                self.merge.setdefault(place, {})[str(record["domain"])] = record
            case "layers":
                for name, numbers in record["layers"].items():
                    self.layers.setdefault(name, Curves(120)).add(record["step"], numbers)
            case "positions":
                self.positions.setdefault(str(record["domain"]), [])[1:] = [record]  # keep the first and the last
            case "sample":
                self._sample(record)
            case "data":
                self.data = record
            case "checkpoint":
                self.checkpoints.append(record)
                self.num_checkpoints += 1
            case "run_started" | "rollback" | "run_finished":
                self._add_run_event(record)
        self.first = self.first or record
        self.last = {"step": record["step"], "time": record.get("time")}

    def cut(self, step: int) -> None:
        """Restore the state after ``step``, to which the run was rolled back."""
        for curves in (self.train, *(d.scores for d in self.domains.values()), *self.layers.values()):
            curves.cut(step)
        for domain in self.domains.values():
            if domain.last["step"] > step and domain.scores.steps:
                kept = ("loss", "perplexity", "bits_per_byte", "delta_loss", "kl_to_base", "in_context_gain")
                numbers = {key: domain.scores.mean(key)[-1] for key in kept}
                domain.last = domain.last | numbers | {"step": domain.scores.steps[-1]}
        self.domains = {name: d for name, d in self.domains.items() if d.scores.steps}
        for measurement in self.measured.values():
            measurement.values.cut(step)
            if measurement.last["step"] > step and measurement.values.steps:
                values, steps = measurement.values.mean("value"), measurement.values.steps
                measurement.last = measurement.last | {"value": values[-1], "stderr": None, "step": steps[-1]}
        self.measured = {key: m for key, m in self.measured.items() if m.values.steps}
        self.samples = {k: [r for r in v if r["step"] <= step] for k, v in self.samples.items()}
        self.positions = {k: [r for r in v if r["step"] <= step] for k, v in self.positions.items()}
        self.checkpoints = deque((r for r in self.checkpoints if r["step"] <= step), maxlen=MAX_CHECKPOINTS)
        self.losses = deque((point for point in self.losses if point[0] <= step), maxlen=MAX_LOSSES)
        windows = bisect_right(self._window_steps, step)
        del self._window_steps[windows:], self._window_seconds[windows:]
        self.trained_seconds = sum(self._window_seconds)
        self._counted = None if self._counted is None else min(self._counted, step)

    def _add_run_event(self, record: Record) -> None:
        self.run_events.append(record)
        self._counted = record["step"]
        if record["event"] == "run_started":
            self.start, self.end, self.merge = record, None, {}
        elif record["event"] == "run_finished":
            self.end = record

    def _train(self, record: Record) -> None:
        self.num_train += 1
        self.last_train = record
        self.losses.append((record["step"], record.get("loss_mean", record.get("loss"))))
        parts = self._parts(record)
        self.train.add(record["step"], record | {f"part/{name}": seconds for name, seconds in parts.items()})
        for name, seconds in parts.items():
            self.seconds[name] += seconds
        if self._counted is not None:
            each = record.get("step_seconds")
            seconds = (record["step"] - self._counted) * (each if is_number(each) else math.nan)
            self._window_steps.append(record["step"])
            self._window_seconds.append(seconds)
            self.trained_seconds += seconds
        self._counted = record["step"]
        on_host = record.get("memory_reserved_gib") is None  # without a GPU, `memory_gib` is host memory
        for kind in ("memory_gib",) if on_host else ("memory_gib", "host_memory_gib"):
            if is_number(gib := record.get(kind)):
                self.memory_gib[kind] = max(self.memory_gib.get(kind, 0.0), gib)

    def _parts(self, record: Record) -> dict[str, float]:
        """Return the seconds since the previous record by part. If the record has no parts of a step but the data, the time of
        the steps is ``other``."""
        steps = max(record["step"] - (self._counted or 0), 1)
        parts = {name: _seconds(record, name) * steps for name in STEP_PARTS}
        unattributed = _seconds(record, "step") * steps - sum(parts.values())
        return parts | {name: _seconds(record, name) for name in WINDOW_PARTS} | {"other": max(unattributed, 0.0)}

    def _evaluation(self, record: Record) -> None:
        name = str(record["domain"])
        known = self.domains.get(name)
        first = scored_before(None if known is None else known.first, record)
        domain = self.domains.setdefault(name, Domain(str(record.get("role")), first, record))
        domain.first, domain.last = first, record
        domain.scores.add(record["step"], record)

    def _sample(self, record: Record) -> None:
        kept = self.samples.setdefault((str(record.get("domain")), str(record.get("prompt"))), [])
        kept[1:] = [record]  # keep the first and the last; assigning a slice past the end appends

    @property
    def results(self) -> dict[str, Record]:
        """Return the last scores of each domain, with the ``step`` at which they were measured."""
        return {name: _without_event(domain.last) for name, domain in self.domains.items()}

    @property
    def measurements(self) -> dict[str, Record]:
        """Return the last record of each metric, with the ``step`` at which it was measured."""
        return {key: _without_event(measurement.last) for key, measurement in self.measured.items()}

    def metrics(
        self, results: Mapping[str, Record] | None = None, measurements: Mapping[str, Record] | None = None
    ) -> dict[str, Any]:
        """Return the numbers by which runs are compared: those of `domain_metrics`, ``train_loss``, ``tokens_per_second``, and
        ``metric/<name>`` or ``metric/<domain>/<name>`` for each metric of an evaluation task. A number that the run does not
        have is ``None``. ``results`` and ``measurements`` replace those of the records, if these are not complete."""
        train, end = self.last_train, self.end or {}
        speeds = (end.get("tokens_per_second"), train.get("tokens_per_second_run"), train.get("tokens_per_second"))
        losses = (train.get("loss_mean"), train.get("loss"))
        return domain_metrics(self.results if results is None else results) | {
            "train_loss": next((loss for loss in losses if loss is not None), None),
            "tokens_per_second": next((speed for speed in speeds if speed is not None), None),
            **metric_values(self.measurements if measurements is None else measurements),
        }


def _without_event(record: Record) -> Record:
    return {k: v for k, v in record.items() if k not in ("event", "step", "time")} | {"step": record["step"]}


def metric_values(measurements: Mapping[str, Record]) -> dict[str, float | None]:
    """Return ``metric/<key>`` → value."""
    return {f"metric/{key}": record.get("value") for key, record in measurements.items()}


def domain_metrics(results: Mapping[str, Record]) -> dict[str, Any]:
    """Return ``new_loss``, ``new_delta`` and ``forgetting`` (nats per token, means over domains), and ``results``, from which
    they are computed: the scores of each domain. Scores of an earlier step than the last one are ignored, because those
    domains are no longer evaluated."""
    last = max((s.get("step", 0) for s in results.values()), default=0)
    scores = [s for s in results.values() if s.get("step", 0) == last]
    of_role = {role: [s for s in scores if s.get("role") == role] for role in ("new", "base")}
    return {
        "new_loss": mean(s.get("loss") for s in of_role["new"]),
        "new_delta": mean(change_of(s) for s in of_role["new"]),
        "forgetting": mean(change_of(s) for s in of_role["base"]),
        "results": results,
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or ``None`` if any value is ``None``, because a mean over fewer values is not comparable."""
    every = list(values)
    known = [v for v in every if v is not None]
    return sum(known) / len(known) if known and len(known) == len(every) else None


def _seconds(record: Record, name: str) -> float:
    value = record.get(f"{name}_seconds")
    return float(value) if is_number(value) else 0.0
