"""Events as plain records: JSON has no NaN and no infinity, so neither has a record; null stands for both."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]  # one line of metrics.jsonl: `event`, `step`, `time`, then numbers, strings or None


def fields_of(event: Any) -> Record:
    """The fields of an event or a score, without ``step``."""
    names = [name for cls in type(event).__mro__ for name in getattr(cls, "__slots__", ()) if name != "step"]
    return json_safe({name: getattr(event, name) for name in names})


def is_clock(name: str) -> bool:
    """Whether a field tells of time or of the machine: two runs that are equal need not share it."""
    return name in ("time", "goodput", "mfu") or name.endswith(("seconds", "_gib")) or "_per_second" in name


def json_safe(record: Record) -> Record:
    return {k: _safe(v) for k, v in record.items()}


def _safe(value: Any) -> Any:
    if isinstance(value, dict):
        return json_safe(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
