"""Curves in constant memory: when there are more records than a curve has points, neighbouring points are merged into one that
has their mean, minimum and maximum."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.telemetry.numbers import is_number
from pretrain.telemetry.record import Record

MAX_POINTS = 400  # maximum number of points of a curve; after merging, at least half as many remain


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
