"""run.json: the metadata, the status and the results of a run. The file is replaced atomically at every change."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.runtime.console import notice
from pretrain.runtime.files import replace_file
from pretrain.telemetry.events import (
    Evaluated,
    Event,
    MergeCurve,
    MetricsEvent,
    RolledBack,
    RunFinished,
    RunStarted,
    Saved,
)
from pretrain.telemetry.record import json_safe

NUMBER = (int, float)
FIELD_TYPES: dict[str, tuple[type, ...]] = {  # of the fields that a later start or a tool reads
    "results": (dict,),
    "metrics": (dict,),
    "status": (str,),
    "device": (str,),
    "model": (str, type(None)),
    **dict.fromkeys(("restarts", "steps", "total_steps", "batch_size"), (int,)),
    **dict.fromkeys(("seconds", "started_at"), NUMBER),
}


class RunFile:
    """A listener that writes run.json.

    ``status`` in the file is running · finished · stopped · failed; ``results`` has the last evaluation of each domain,
    ``metrics`` the last value of each metric of an evaluation task; ``started_at`` is the time of the first start in Unix
    seconds. ``summary`` returns the numbers of the whole run (see `Monitor.summary`); it is called at every event.

    If the file can't be written, that is reported once and the run continues; the next event tries again."""

    def __init__(self, run: Path, summary: Callable[[], dict[str, Any]] = dict) -> None:
        self._path = run / "run.json"
        self._summary = summary
        self._facts: dict[str, Any] = {}
        self._earlier: dict[str, dict[str, Any]] = {}  # results and metrics whose records may be missing
        self._started_at = time.monotonic()
        self._earlier_seconds = 0.0
        self._failure_reported = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            facts = dict(event.facts)
            facts.pop("launch_restarts", 0)
            earlier = earlier_facts(self._path.parent, event)
            self._earlier_seconds = earlier.get("seconds", 0.0)
            self._earlier = {name: earlier.get(name, {}) for name in ("results", "metrics")}
            earlier_fields = {"results": {}, "metrics": {}, "restarts": earlier.get("restarts", -1) + 1}
            earlier_fields["started_at"] = earlier.get("started_at", time.time() - self._earlier_seconds)
            self._facts = earlier_fields | facts | {"status": "running", "total_steps": event.total_steps}
        elif not self._facts:  # the run failed before RunStarted: keep the file of an earlier start
            return
        elif isinstance(event, RunFinished):
            self._facts |= {"status": event.status, "tokens": event.tokens}
            self._facts["model"] = str(event.model) if event.model else None
            self._facts["stopped_by"] = event.stopped_by
        elif isinstance(event, MergeCurve):
            self._facts["merge_alpha"] = None if event.chosen is None else event.chosen.alpha
            self._facts["merge_checkpoint"] = None if event.chosen is None else event.chosen.checkpoint
        elif not isinstance(event, Evaluated | MetricsEvent | Saved | RolledBack):
            return
        steps = event.step
        if isinstance(event, Saved):  # a checkpoint may be reported some steps later
            steps = max(steps, self._facts.get("steps", 0))
        self._facts |= {"steps": steps, "seconds": self._earlier_seconds + time.monotonic() - self._started_at}
        self._facts |= json_safe(self._summary())
        self._facts |= {name: known | self._facts[name] for name, known in self._earlier.items()}
        try:
            write_json(self._path, self._facts)
        except OSError as error:
            if not self._failure_reported:
                notice(f"{self._path} can't be written: {error.strerror}; the run continues")
            self._failure_reported = True


def read_run_file(run: Path) -> dict[str, Any]:
    """Return the content of run.json without the values whose type is not what a run writes. The result is empty if the file
    is missing, incomplete or not a JSON object."""
    try:
        facts = json.loads((run / "run.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return {
        name: value for name, value in facts.items() if name not in FIELD_TYPES or _is_one(value, FIELD_TYPES[name])
    }


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, dict) and not all(isinstance(inner, dict) for inner in value.values()):
        return False  # `results` holds one dict per domain, `metrics` one per metric
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, kinds) and not isinstance(value, bool)


def earlier_facts(run: Path, start: RunStarted) -> dict[str, Any]:
    """Return what earlier starts of the same run wrote to run.json; the result is empty for a new run in the folder of an old
    one."""
    return read_run_file(run) if start.resumed or start.facts.get("launch_restarts", 0) else {}


def mark_failed(run: Path) -> None:
    """Set the status in run.json to ``failed``. The process that has seen all processes of a run die calls this, because none
    of them could."""
    facts = read_run_file(run)
    if facts.get("status") == "running":
        with suppress(OSError):  # on a full disk the status remains `running`
            write_json(run / "run.json", facts | {"status": "failed"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace ``path`` atomically, so that a reader never sees an incomplete file."""
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
