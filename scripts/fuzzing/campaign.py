"""Input after input until the time is over: edit, run, judge, count; what should not happen is made small and kept."""

from __future__ import annotations

import gc
import re
import shlex
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzzing.kind import BEFORE, FINE, HANG, OTHER, REFUSED, SAME, TRACEBACK, VALID, Base, Kind, Verdict
from fuzzing.sandbox import Result, command

REAL_EVERY = 40  # of so many inputs one is run by the real command, which takes seconds to start
COLUMNS = (SAME, VALID, BEFORE, REFUSED, TRACEBACK, HANG, OTHER)
HEADS = ("same", "valid", "before", "refused", "tracebacks", "hangs", "other")
LEFT_OUT = ("cache", "home", ".out", ".err", ".answer")  # of a finding's folder: what the command made


@dataclass(frozen=True)
class Input:
    """Input ``number`` of a campaign, which says all about it: kind, variant and edits."""

    number: int
    kind: Kind
    variant: str
    edits: tuple[int, ...]  # a seed each
    real: bool


@dataclass
class Outcome:
    verdict: Verdict
    said: list[str]
    arguments: list[str]
    result: Result


@dataclass
class Campaign:
    """``folder``: where the inputs are made; ``findings``: where those stay that found something, by their key. ``verbose``:
    say of every input what came of it."""

    kinds: list[Kind]
    seed: int
    folder: Path
    findings: Path
    verbose: bool = False
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    found: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def input(self, number: int) -> Input:
        draw = Random(f"{self.seed} {number}")
        kind = self.kinds[number % len(self.kinds)]
        edits = tuple(draw.getrandbits(64) for _ in range(draw.choice([1, 1, 1, 2, 3])))
        return Input(number, kind, draw.choice(kind.variants), edits, draw.randrange(REAL_EVERY) == 0)

    def run(self, *, seconds: float, inputs: int | None, first: int = 0) -> None:
        """Inputs ``first``, ``first`` + 1, … for so many ``seconds``, and at most ``inputs`` of them."""
        gc.collect()
        gc.freeze()  # a fork that collects garbage would copy all of this process's memory
        ends_at = time.monotonic() + seconds
        number = first
        while time.monotonic() < ends_at and (inputs is None or number < first + inputs):
            self.one(self.input(number))
            number += 1

    def one(self, given: Input) -> Verdict:
        base = given.kind.base(given.variant)
        outcome = self.attempt(given, base, given.edits)
        if outcome.verdict.what == HANG:  # once more: the machine may have been busy
            outcome = self.attempt(given, base, given.edits)
        verdict = outcome.verdict
        if self.verbose:
            last = (outcome.result.err.strip().splitlines() or [""])[-1]
            print(f"{given.number} {given.kind.name}, {given.variant}: {verdict.what}: {last[:200]}", flush=True)
        self.counts.setdefault(given.kind.name, Counter())[verdict.what] += 1
        if not verdict.fine:
            numbers = self.found.setdefault((given.kind.name, verdict.key), [])
            numbers.append(given.number)
            if len(numbers) == 1:
                self.keep(given, base, outcome)
        shutil.rmtree(self.place(given), ignore_errors=True)
        return verdict

    def place(self, given: Input) -> Path:
        return self.folder / "inputs" / str(given.number)

    def attempt(self, given: Input, base: Base, edits: tuple[int, ...]) -> Outcome:
        """The base with these ``edits``, run and judged."""
        place, kind = self.place(given), given.kind
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(base.folder, place, symlinks=True)
        said = [kind.edit(Random(edit), base, place) for edit in edits]
        arguments = kind.arguments(Random(given.number), base, place)
        result = command(arguments, place, real=given.real)
        names = [Path(one.split(":")[0]).name for one in said] + re.findall(r"exchanged with (\S+)", "\n".join(said))
        return Outcome(kind.judge(base, place, result, names), said, arguments, result)

    def keep(self, given: Input, base: Base, outcome: Outcome) -> None:
        """Write a finding with as few of its edits as still find it."""
        edits = given.edits
        for edit in given.edits:
            fewer = tuple(e for e in edits if e != edit)
            if fewer and (again := self.attempt(given, base, fewer)).verdict.key == outcome.verdict.key:
                edits, outcome = fewer, again
        outcome = self.attempt(given, base, edits)
        slug = re.sub(r"\W+", "-", outcome.verdict.key)[:80].strip("-")
        folder = self.findings / f"{given.kind.name}-{slug}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.place(given), folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        words = " ".join(shlex.quote(word) for word in outcome.arguments)
        (folder / "command.sh").write_text(f'cd "$(dirname "$0")" && PRETRAIN_CACHE=cache python -m pretrain {words}\n')
        lines = [
            f"{outcome.verdict.what}: {outcome.verdict.key}",
            f"seed {self.seed}, input {given.number}: {given.variant}",
        ]
        lines += [*outcome.said, "", outcome.verdict.why, "", "stderr:", outcome.result.err[-6000:]]
        (folder / "what.txt").write_text("\n".join(lines), errors="replace")
        print(f"{outcome.verdict.what}: {given.kind.name}: {outcome.verdict.key}\n    {folder}", flush=True)

    @property
    def total(self) -> int:
        return sum(counts.total() for counts in self.counts.values())

    @property
    def wrong(self) -> int:
        return sum(counts[what] for counts in self.counts.values() for what in COLUMNS if what not in FINE)

    def table(self) -> str:
        """Inputs by kind and by what came of them."""
        rows = [("kind", "inputs", *HEADS)]
        every: Counter[str] = Counter()
        for name, counts in sorted(self.counts.items()):
            rows.append((name, *_cells(counts)))
            every += counts
        rows.append(("all", *_cells(every)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )


def _cells(counts: Counter[str]) -> tuple[str, ...]:
    return (str(counts.total()), *(str(counts[what]) for what in COLUMNS))
