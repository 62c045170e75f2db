"""Events as plain records: JSON has no NaN and no infinity, so neither has a record; null stands for both."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]  # one line of metrics.jsonl: `event`, `step`, `time`, then numbers, strings or None; of another
# version's run any other field may be absent

STEP_PARTS = ("data", "compute", "optimizer", "communication")  # seconds of a mean step
WINDOW_PARTS = ("evaluation", "checkpoint")  # seconds between two records, beside its steps


def fields_of(event: Any) -> Record:
    """The fields of an event or a score, without ``step``."""
    names = [name for cls in type(event).__mro__ for name in getattr(cls, "__slots__", ()) if name != "step"]
    return json_safe({name: getattr(event, name) for name in names})


def scored_before(known: Record | None, record: Record) -> Record:
    """What the untouched model's evaluation of a domain says beside ``record``, a later one or the same. ``known``: of
    step 0, as far as it has been seen; where ``record`` is of other text it is worked out from the change, and its numbers
    are ``None`` where that is not known either."""
    if record["step"] == 0:
        return record
    same = known is not None and known.get("digest") == record.get("digest") and known.get("loss") is not None
    return known if known and same else _worked_out(record)


def change_of(record: Record) -> float | None:
    """Nats per token that a domain's loss has changed since step 0; ``None``: not known, or not scored since."""
    delta = record.get("delta_loss")
    return None if record.get("step") == 0 or record.get("loss") is None else delta


def _worked_out(record: Record) -> Record:
    loss, delta = record.get("loss"), record.get("delta_loss")
    numbers: Record = {"loss": None, "perplexity": None, "bits_per_byte": None, "delta_loss": None}
    if loss is not None and delta is not None:
        before = loss - delta
        numbers |= {"loss": before, "perplexity": math.exp(before) if before < 700 else None, "delta_loss": 0.0}
    return record | numbers | {"step": 0}


def is_clock(name: str) -> bool:
    """Whether a field tells of time or of the machine: two runs that are equal need not share it."""
    return name in ("time", "goodput", "mfu") or name.endswith(("seconds", "_gib")) or "_per_second" in name


def json_safe(record: Record) -> Record:
    return {k: _safe(v) for k, v in record.items()}


def _safe(value: Any) -> Any:
    if isinstance(value, dict):
        return json_safe(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


WITH_EVALUATION = ("evaluation", "sample", "data")  # events that are made again where an evaluation is
FAMILIES = ("layers", "sources")  # fields that hold a record for each of several names


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by a path of the kind that dashboards group by: ``train/loss``,
    ``evaluation/<domain>/perplexity``, ``layers/<name>/grad_norm``, ``data/<source>/tokens``."""
    found: dict[str, float] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                add(path if key in FAMILIES else f"{path}/{key}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = value

    event, domain = record["event"], record.get("domain")
    own = {key: value for key, value in record.items() if key not in ("step", "time")}
    add(f"{event}/{domain}" if domain else event, own)
    return found
