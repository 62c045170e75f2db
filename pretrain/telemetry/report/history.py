"""The history of a run for its report page, in constant memory: a curve keeps at most some hundred points.

When there are more records than that, neighbouring points are merged into one that has their mean, minimum and maximum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pretrain.telemetry.numbers import is_number
from pretrain.telemetry.record import STEP_PARTS, WINDOW_PARTS, Record, change_of, scored_before

MAX_POINTS = 400  # maximum number of points of a curve; after merging, at least half as many remain
MAX_CHECKPOINTS = 12  # the last checkpoints that are listed
MAX_EVENTS = 200  # starts and rollbacks that are listed

PARTS = (*STEP_PARTS, *WINDOW_PARTS, "other")


@dataclass(slots=True)
class _Point:
    """One point of a curve. ``numbers`` maps each key to [count, sum, minimum, maximum] over ``records`` records."""

    step: int
    records: int = 0
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, record: Record) -> None:
        self.step, self.records = step, self.records + 1
        for key, value in record.items():
            if is_number(value):
                known = self.numbers.get(key)
                if known is None:
                    self.numbers[key] = [1, value, value, value]
                else:
                    known[:] = known[0] + 1, known[1] + value, min(known[2], value), max(known[3], value)

    def merge(self, later: _Point) -> None:
        self.step, self.records = later.step, self.records + later.records
        for key, (count, total, low, high) in later.numbers.items():
            known = self.numbers.setdefault(key, [0, 0.0, low, high])
            known[:] = known[0] + count, known[1] + total, min(known[2], low), max(known[3], high)


class Curves:
    """Curves of several keys over the same steps, thinned to at most ``points`` points."""

    def __init__(self, points: int = MAX_POINTS) -> None:
        self._limit = points
        self._points: list[_Point] = []
        self.width = 1  # records per point

    def add(self, step: int, record: Record) -> None:
        """Add every finite number of ``record``; other values are ignored."""
        if not self._points or self._points[-1].records >= self.width:
            self._points.append(_Point(step))
        self._points[-1].add(step, record)
        if len(self._points) > self._limit:
            self._halve()

    def _halve(self) -> None:
        for left, right in zip(self._points[::2], self._points[1::2], strict=False):
            left.merge(right)
        self._points = self._points[::2]
        self.width *= 2

    def cut(self, step: int) -> None:
        """Remove all points that include records after ``step``."""
        self._points = [p for p in self._points if p.step <= step]

    @property
    def steps(self) -> list[int]:
        """Return the last step of every point."""
        return [p.step for p in self._points]

    def mean(self, key: str) -> list[float | None]:
        """Return the mean of ``key`` at every point; ``None`` where no record has it."""
        found = (p.numbers.get(key) for p in self._points)
        return [None if n is None else n[1] / n[0] for n in found]

    def low(self, key: str) -> list[float | None]:
        """Return the minimum of ``key`` at every point."""
        return [p.numbers[key][2] if key in p.numbers else None for p in self._points]

    def high(self, key: str) -> list[float | None]:
        """Return the maximum of ``key`` at every point."""
        return [p.numbers[key][3] if key in p.numbers else None for p in self._points]

    def has(self, key: str) -> bool:
        """Return whether any point has ``key``."""
        return any(key in p.numbers for p in self._points)

    def median(self, key: str) -> float | None:
        """Return the median of the points' means of ``key``, or ``None``."""
        values = sorted(v for v in self.mean(key) if v is not None)
        return values[len(values) // 2] if values else None


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


class History:
    """The history of a run. Records are added in order, from a file or while the run writes them.

    Attributes:
        train: Curves of the train records.
        last_train: Last train record.
        num_train: Number of train records.
        domains: Scores by domain.
        layers: Curves of the norms by layer.
        samples: First and last sample by domain and prompt.
        data: Last ``data`` record.
        checkpoints: Last checkpoint records.
        num_checkpoints: Number of checkpoint records.
        happened: Last starts, rollbacks and ends.
        first: First record.
        start: Last ``run_started`` record.
        end: ``run_finished`` record of the last start, if it exists.
        last: Step and time of the last record.
        seconds: Total seconds by part.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.train = Curves()
        self.last_train: Record = {}
        self.num_train = 0
        self.domains: dict[str, Domain] = {}
        self.layers: dict[str, Curves] = {}
        self.samples: dict[tuple[str, str], list[Record]] = {}  # key: domain, prompt; value: first and last
        self.data: Record = {}
        self.checkpoints: deque[Record] = deque(maxlen=MAX_CHECKPOINTS)
        self.num_checkpoints = 0
        self.run_events: deque[Record] = deque(maxlen=MAX_EVENTS)  # starts, rollbacks, ends
        self.first: Record = {}
        self.start: Record = {}
        self.end: Record | None = None
        self.last: Record = {}
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._counted = 0  # the step up to which seconds are counted
        for record in records:
            self.add(record)

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
            case "layers":
                for name, numbers in record["layers"].items():
                    self.layers.setdefault(name, Curves(120)).add(record["step"], numbers)
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
                kept = ("loss", "perplexity", "bits_per_byte", "delta_loss")
                numbers = {key: domain.scores.mean(key)[-1] for key in kept}
                domain.last = domain.last | numbers | {"step": domain.scores.steps[-1]}
        self.domains = {name: d for name, d in self.domains.items() if d.scores.steps}
        self.samples = {k: [r for r in v if r["step"] <= step] for k, v in self.samples.items()}
        self.checkpoints = deque((r for r in self.checkpoints if r["step"] <= step), maxlen=MAX_CHECKPOINTS)
        self._counted = min(self._counted, step)

    def _add_run_event(self, record: Record) -> None:
        self.run_events.append(record)
        self._counted = record["step"]
        if record["event"] == "run_started":
            self.start, self.end = record, None
        elif record["event"] == "run_finished":
            self.end = record

    def _train(self, record: Record) -> None:
        self.num_train += 1
        self.last_train = record
        parts = self._parts(record)
        self.train.add(record["step"], record | {f"part/{name}": seconds for name, seconds in parts.items()})
        for name, seconds in parts.items():
            self.seconds[name] += seconds
        self._counted = record["step"]

    def _parts(self, record: Record) -> dict[str, float]:
        """Return the seconds since the previous record by part. If the record has no parts of a step but the data, the time of
        the steps is ``other``."""
        steps = max(record["step"] - self._counted, 1)
        parts = {name: _seconds(record, name) * steps for name in STEP_PARTS}
        unattributed = _seconds(record, "step") * steps - sum(parts.values())
        return parts | {name: _seconds(record, name) for name in WINDOW_PARTS} | {"other": max(unattributed, 0.0)}

    def _evaluation(self, record: Record) -> None:
        domain = self.domains.setdefault(str(record["domain"]), Domain(str(record.get("role")), record, record))
        domain.first, domain.last = scored_before(domain.first, record), record
        domain.scores.add(record["step"], record)

    def _sample(self, record: Record) -> None:
        kept = self.samples.setdefault((str(record.get("domain")), str(record.get("prompt"))), [])
        kept[1:] = [record]  # keep the first and the last; assigning a slice past the end appends


def _seconds(record: Record, name: str) -> float:
    value = record.get(f"{name}_seconds")
    return float(value) if is_number(value) else 0.0
