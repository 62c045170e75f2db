"""metrics.jsonl: every record of the run, once, in order. Other tools read this file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.runtime.console import notice
from pretrain.runtime.files import keep_copy, replace_file
from pretrain.runtime.lines import json_lines
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import WITH_EVALUATION
from pretrain.telemetry.sinks.base import Sink
from pretrain.telemetry.sinks.retrying_file import RetryingAppendFile

TAIL_BYTES = 1 << 16


class Jsonl(Sink):
    """A sink that writes one JSON object per line to metrics.jsonl."""

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


def read_records(path: Path, *, on_invalid: Callable[[str], None] = notice) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl or quarantine.jsonl.

    An incomplete last line (the run was killed while writing it) is skipped, and so is any other line that is not a record;
    the latter are reported to ``on_invalid`` with file and line number.

    Raises ``OSError`` for a file that can't be read.
    """
    return list(iter_records(path, on_invalid=on_invalid))


def iter_records(
    path: Path, *, on_invalid: Callable[[str], None] = notice, on_incomplete: Callable[[str], None] = lambda where: None
) -> Iterator[dict[str, Any]]:
    """Yield the records of a file one by one, without loading the whole file. ``on_incomplete`` is called with ``file:line`` of
    an incomplete last line. See `read_records`."""

    def invalid(number: int) -> None:
        on_invalid(f"{path}:{number}: not a record; this line is skipped, later lines are read")

    with path.open("rb") as file:
        lines = json_lines(file, on_invalid=invalid, on_incomplete=lambda number: on_incomplete(f"{path}:{number}"))
        for number, record in lines:
            if is_record(record):
                yield record
            else:
                invalid(number)


def is_record(value: Any) -> bool:
    """Return whether a JSON value is an object with a step."""
    if not isinstance(value, dict) or not isinstance(value.get("event", ""), str):
        return False
    step = value.get("step")
    return isinstance(step, int) and not isinstance(step, bool)


def tail(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the last records of a metrics.jsonl. An incomplete line at either end of the part that is read is skipped."""
    with suppress(OSError), file.open("rb") as lines:
        lines.seek(max(0, lines.seek(0, 2) - TAIL_BYTES))
        yield from (record for _, record in json_lines(lines) if is_record(record))


def records_until(
    path: Path, start: RunStarted, *, on_invalid: Callable[[str], None] = lambda where: None
) -> list[dict[str, Any]]:
    """Return the records up to the step at which a run resumes.

    The ``run_finished`` record of a finished run is dropped, because the run now continues. If the evaluation of that step is
    pending, its records (with samples and data statistics) are dropped too, because it is repeated. Records that were saved
    with the checkpoint but are missing in the file are appended; without a file they are the only records. Those of the merge
    curve are dropped, because it is scored at the end."""

    def holds(record: dict[str, Any]) -> bool:
        again = record["step"] == start.step and start.pending_evaluation and record["event"] in WITH_EVALUATION
        at_the_end = record["event"] == "merge" or record.get("status") == "finished"
        return record["step"] <= start.step and not again and not at_the_end

    records = read_records(path, on_invalid=on_invalid) if path.exists() else []
    if start.records:
        oldest = min(record["step"] for record in start.records)
        known = {json.dumps(record) for record in records if record["step"] >= oldest}
        records += [record for record in start.records if json.dumps(record) not in known]
    return [record for record in records if holds(record)]


def cut(path: Path, start: RunStarted) -> None:
    """Remove the records of steps after ``start.step`` from the file: a crash lost those steps, and they are trained again.

    A run that starts over (step 0) removes everything. If any line is not a record, a copy of the old file is kept next to the
    new one.
    """
    invalid: list[str] = []
    kept = records_until(path, start, on_invalid=invalid.append) if start.step > 0 else []
    keep_broken(path, invalid)
    replace_file(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), flush=True)


def keep_broken(path: Path, invalid: Sequence[str]) -> None:
    """Keep a copy of ``path`` and report the first message of ``invalid``, before ``path`` is rewritten without the invalid lines
    that ``invalid`` describes."""
    if invalid:
        keep_copy(path)
        notice(invalid[0] + (f" (and {len(invalid) - 1} more such lines)" if len(invalid) > 1 else ""))
