"""metrics.jsonl: every record of the run, once, in order. The file other tools read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.runtime.atomic_files import keep_copy, replace_file
from pretrain.runtime.console import notice
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import WITH_EVALUATION
from pretrain.telemetry.sinks.base import Sink
from pretrain.telemetry.sinks.retrying_file import RetryingAppendFile

TAIL_BYTES = 1 << 16


class Jsonl(Sink):
    """One JSON object a line."""

    def __init__(self) -> None:
        self._file: RetryingAppendFile | None = None

    def open(self, run: Path, start: RunStarted) -> None:
        path = run / "metrics.jsonl"
        if path.exists() or start.records:
            cut(path, start)
        self._file = RetryingAppendFile(path)

    def write(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_records(path: Path, *, say: Callable[[str], None] = notice) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or quarantine.jsonl. A torn last line (the run was killed while writing it) is left
    out, and any other that is no record too; ``say`` is told of those, file and line.

    Raises ``OSError`` for a file that can't be read.
    """
    return list(iter_records(path, say=say))


def iter_records(
    path: Path, *, say: Callable[[str], None] = notice, torn: Callable[[str], None] = lambda where: None
) -> Iterator[dict[str, Any]]:
    """The same one by one, of files that are better not held whole. ``torn`` is told of a torn last line: file and number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _record(line)
            if record is not None:
                yield record
            elif not line.endswith(b"\n"):
                torn(f"{path}:{number}")
            elif line.strip():
                say(f"{path}:{number}: no record; this line is left out, those after it are read")


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line holds; ``None``: no JSON, cut in the middle of a character, or nothing that has a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event", ""), str):
        return None
    step = record.get("step")
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def tail(file: Path) -> Iterator[dict[str, Any]]:
    """The last records of a metrics.jsonl; what is torn at either end is passed over."""
    with suppress(OSError), file.open("rb") as lines:
        lines.seek(max(0, lines.seek(0, 2) - TAIL_BYTES))
        for line in lines.read().split(b"\n"):
            if (record := _record(line)) is not None:
                yield record


def records_until(
    path: Path, start: RunStarted, *, say: Callable[[str], None] = lambda where: None
) -> list[dict[str, Any]]:
    """The records up to the step where a run goes on: without the end it has not come to, and without the evaluation of that
    step, and what comes with it, where it owes that: it is about to be made again. Those that the checkpoint brought and the
    file lost stand at the end; without a file they are all there is."""

    def holds(record: dict[str, Any]) -> bool:
        again = record["step"] == start.step and start.pending_evaluation and record["event"] in WITH_EVALUATION
        return record["step"] <= start.step and not again and record.get("status") != "finished"

    records = read_records(path, say=say) if path.exists() else []
    if start.records:
        oldest = min(record["step"] for record in start.records)
        known = {json.dumps(record) for record in records if record["step"] >= oldest}
        records += [record for record in start.records if json.dumps(record) not in known]
    return [record for record in records if holds(record)]


def cut(path: Path, start: RunStarted) -> None:
    """Drop the records of steps beyond that of ``start``: they were lost with a crash and are about to be trained again.

    A run that starts over (step 0) drops everything. A file with a line that is no record is kept beside the new one.
    """
    odd: list[str] = []
    kept = records_until(path, start, say=odd.append) if start.step > 0 else []
    keep_broken(path, odd)
    replace_file(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), flush=True)


def keep_broken(path: Path, odd: Sequence[str]) -> None:
    """Before ``path`` is rewritten without the lines that ``odd`` is about, keep a copy of it, and say the first of them."""
    if odd:
        keep_copy(path)
        notice(odd[0] + (f" (and {len(odd) - 1} more such lines)" if len(odd) > 1 else ""))
