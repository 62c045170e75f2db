"""metrics.jsonl: every record of the run, once, in order. The file other tools read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from pretrain.console import notice
from pretrain.events import RunStarted
from pretrain.replace import replace_file


class Jsonl:
    """One JSON object a line, written at once, so that a killed run has all lines up to the kill. What a disk does not
    take waits, and is tried again with the next record."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._waiting = b""
        self._said = False

    def open(self, run: Path, start: RunStarted) -> None:
        path = run / "metrics.jsonl"
        if path.exists():
            cut_after(path, start.step, owes_evaluation=start.owes_evaluation, brought=start.records)
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        self._waiting += (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        assert self._file is not None
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._said:
                notice(f"{self._file.name} can't be written: {error.strerror}; its records wait, the run goes on")
            self._said = True

    def close(self) -> None:
        if self._file is not None:
            self._write()
            self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a torn last line (the run was killed while writing it) is left out.

    Raises ``ValueError`` with file and line when any other line is broken.
    """
    return list(iter_records(path))


def iter_records(path: Path, *, torn: Callable[[str], None] = lambda where: None) -> Iterator[dict[str, Any]]:
    """The same one by one, of files that are better not held whole. ``torn`` is told of a torn last line: file and number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line == b"\n":
                continue
            try:
                yield json.loads(line)
            except ValueError as error:  # no JSON, or cut in the middle of a character
                if not line.endswith(b"\n"):
                    torn(f"{path}:{number}")
                    return
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error


def records_until(
    path: Path, step: int, *, owes_evaluation: bool = False, brought: Iterable[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The records up to ``step``, of a run that goes on there: without the end it has not come to, and without the
    evaluation of ``step`` where it ``owes_evaluation``, which is about to be made again. ``brought``: the latest ones, as
    the checkpoint knows them; those that the file lost are put at its end."""

    def holds(record: dict[str, Any]) -> bool:
        again = record["step"] == step and owes_evaluation and record["event"] == "evaluation"
        return record["step"] <= step and not again and record.get("status") != "finished"

    records = read_records(path)
    known = {json.dumps(record) for record in records}
    return [r for r in records + [b for b in brought if json.dumps(b) not in known] if holds(r)]


def cut_after(path: Path, step: int, *, owes_evaluation: bool = False, brought: Iterable[dict[str, Any]] = ()) -> None:
    """Drop the records of steps beyond ``step``: they were lost with a crash and are about to be trained again. ``brought``:
    see `records_until`.

    A run that starts over (step 0) drops everything.
    """
    kept = records_until(path, step, owes_evaluation=owes_evaluation, brought=brought) if step > 0 else []
    replace_file(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), flush=True)
