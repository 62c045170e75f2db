"""One number that an evaluation task has measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that an evaluation has measured.

    Attributes:
        name: Name of the metric, such as ``accuracy``; without ``/``.
        value: The measured value. NaN and infinity are recorded as null.
        unit: Unit of the value; empty for a number without one.
        better: Whether a lower or a higher value is better.
        domain: The domain of the text on which it was measured; ``None`` for no domain of the run.
        stderr: Standard error of the value; ``None`` where it is unknown.
    """

    name: str
    value: float
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    domain: str | None = None
    stderr: float | None = None
