"""Events as plain records: JSON has no NaN and no infinity, so neither has a record; null stands for both."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]  # one line of metrics.jsonl: `event`, `step`, `time`, then numbers, strings or None


def fields_of(event: Any) -> Record:
    """The fields of an event or a score, without ``step``."""
    names = [name for cls in type(event).__mro__ for name in getattr(cls, "__slots__", ()) if name != "step"]
    return json_safe({name: getattr(event, name) for name in names})


def json_safe(record: Record) -> Record:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
