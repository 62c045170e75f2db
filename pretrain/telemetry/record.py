"""Records: events as plain dicts. JSON has no NaN and no infinity, so a record has null instead of either."""

from __future__ import annotations

import math
from typing import Any

# One line of metrics.jsonl: `event`, `step`, `time`, then numbers, strings or None. In a run of another version any field but
# these three may be missing.
Record = dict[str, Any]

STEP_PARTS = ("data", "compute", "optimizer", "communication")  # parts of a step; their seconds are means per step
WINDOW_PARTS = ("evaluation", "checkpoint")  # other time between two train records; their seconds are sums


def fields_of(event: Any) -> Record:
    """Return the fields of an event or a score, without ``step`` and ``positions``, which is a record of its own."""
    apart = ("step", "positions")
    names = [name for cls in type(event).__mro__ for name in getattr(cls, "__slots__", ()) if name not in apart]
    return json_safe({name: getattr(event, name) for name in names})


def scored_before(known: Record | None, record: Record) -> Record:
    """Return the step-0 evaluation (of the base model) that ``record``, a later evaluation of the same domain, is compared
    with.

    ``known`` is the evaluation at step 0, if it has been read. If ``record`` scored other text than ``known``, the numbers are
    computed from the ``delta_loss`` of ``record``; they are ``None`` where that is unknown too."""
    if record["step"] == 0:
        return record
    same = known is not None and known.get("digest") == record.get("digest") and known.get("loss") is not None
    return known if known and same else _worked_out(record)


def change_of(record: Record) -> float | None:
    """Return the change of a domain's loss since step 0 in nats per token, or ``None`` if it is unknown or the domain has not
    been scored since."""
    delta = record.get("delta_loss")
    return None if record.get("step") == 0 or record.get("loss") is None else delta


def _worked_out(record: Record) -> Record:
    loss, delta = record.get("loss"), record.get("delta_loss")
    numbers: Record = {"loss": None, "perplexity": None, "bits_per_byte": None, "delta_loss": None}
    if loss is not None and delta is not None:
        before = loss - delta
        numbers |= {"loss": before, "perplexity": math.exp(before) if before < 700 else None, "delta_loss": 0.0}
    return record | numbers | {"step": 0}


def metric_key(record: Record) -> str:
    """Return ``<name>`` or ``<domain>/<name>`` of a metric, by which runs are compared. A name has no ``/``."""
    return f"{record['domain']}/{record['name']}" if record.get("domain") else str(record["name"])


def is_clock(name: str) -> bool:
    """Return whether a field depends on time or on the machine, so that two equal runs may differ in it."""
    return name in ("time", "goodput", "mfu") or name.endswith(("seconds", "_gib")) or "_per_second" in name


def json_safe(record: Record) -> Record:
    """Return ``record`` with ``None`` in place of every NaN and infinity."""
    return {k: _safe(v) for k, v in record.items()}


def _safe(value: Any) -> Any:
    if isinstance(value, dict):
        return json_safe(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


WITH_EVALUATION = (
    "evaluation",
    "positions",
    "metric",
    "sample",
    "data",
)  # events that are written again when an evaluation is repeated
FAMILIES = ("layers", "sources")  # fields that map names to records


def scalars(record: Record) -> dict[str, float]:
    """Return the numbers of a record by paths that dashboards can group: ``train/loss``,
    ``evaluation/<domain>/perplexity``, ``metric/<domain>/<name>``, ``merge/<alpha>/<domain>/loss`` (of a
    checkpoint: ``merge/step-<step>/<alpha>/…``),
    ``layers/<name>/grad_norm``, ``data/<source>/tokens``, ``data/parts/<part>/share``."""
    found: dict[str, float] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                add(path if key in FAMILIES else f"{path}/{key}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = value

    event, domain = record["event"], record.get("domain")
    if event == "metric":
        add(f"metric/{metric_key(record)}", record["value"])
        add(f"metric/{metric_key(record)}/stderr", record.get("stderr"))
        return found
    if event == "merge":
        step = record.get("checkpoint")
        event = f"merge/{record['alpha']:g}" if step is None else f"merge/step-{step}/{record['alpha']:g}"
        record = {k: v for k, v in record.items() if k not in ("alpha", "checkpoint")}
    own = {key: value for key, value in record.items() if key not in ("step", "time")}
    add(f"{event}/{domain}" if domain else event, own)
    return found
