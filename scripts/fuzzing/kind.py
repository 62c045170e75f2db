"""What every kind of input has in common: an unedited base, edits of its files, and what may come of an edited one."""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.edits import edit_file
from fuzzing.sandbox import Result, command, forked
from fuzzing.values import Values

SAME, VALID, BEFORE, REFUSED = "same", "valid", "before", "refused"
TRACEBACK, HANG, OTHER = "traceback", "hang", "other"
FINE = (SAME, VALID, BEFORE, REFUSED)
LONGEST_LINE = 4000  # of an error message: it must not hold the file it is about


@dataclass(frozen=True)
class Verdict:
    """``what``: one of the seven above. ``key``: tells findings apart; equal ones have one cause. ``why``: for people."""

    what: str
    key: str = ""
    why: str = ""

    @property
    def fine(self) -> bool:
        return self.what in FINE


def other(key: str, why: str = "") -> Verdict:
    return Verdict(OTHER, key, why or key)


@dataclass
class Base:
    """An unedited input in ``folder``, its command with paths relative to that, and what came of it."""

    folder: Path
    arguments: list[str]
    outcome: Any = None
    notes: dict[str, Any] = field(default_factory=dict)


class Kind(ABC):
    """One kind of input. ``folder``: where its bases are made, once each, when they are first asked for."""

    name: str
    variants: tuple[str, ...]
    names: tuple[str, ...] = ()  # words of which a refusal must have one; or the name of an edited file

    def __init__(self, folder: Path, model: Path, values: Values) -> None:
        self.folder, self.model, self.values = folder / self.name, model, values
        self._bases: dict[str, Base] = {}

    def base(self, variant: str) -> Base:
        """The unedited input, run once. Raises ``RuntimeError`` where that is not what it should be."""
        if variant not in self._bases:
            place = self.folder / re.sub(r"\W", "-", variant)
            place.mkdir(parents=True)
            made = self.make(variant, place)
            trial = self.folder / f"{place.name}.trial"
            shutil.copytree(place, trial, symlinks=True)
            result = command(made.arguments, trial)
            if result.code:
                raise RuntimeError(f"{self.name}, {variant}: the unedited input ends with {result.code}:\n{result.err}")
            made.outcome = self.outcome(made, trial, result)
            verdict = self.judge(made, trial, result, [])
            if verdict.what != SAME:
                raise RuntimeError(f"{self.name}, {variant}: the unedited input is {verdict}")
            shutil.rmtree(trial)
            self._bases[variant] = made
        return self._bases[variant]

    @abstractmethod
    def make(self, variant: str, place: Path) -> Base:
        """Make the unedited input in ``place``."""

    @abstractmethod
    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        """What came of a command that ended with 0, comparable by ``==``."""

    @abstractmethod
    def editable(self, base: Base, place: Path) -> list[Path]:
        """The files that are edited."""

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        """One random edit; say which."""
        files = self.editable(base, place)
        if not files:
            return "nothing left to edit"
        return self.edit_one(draw, draw.choice(files), place)

    def edit_one(self, draw: Random, file: Path, place: Path) -> str:
        """One random edit of ``file``, or of what lies at its path."""
        name = str(file.relative_to(place))
        if draw.random() < 0.1 or not file.is_file():
            return f"{name}: {edit_place(draw, file, sorted(file.parent.iterdir()))}"
        raw = file.read_bytes()
        changed = edit_file(draw, file.name, raw, self.values)
        file.unlink()  # a link that an earlier edit has put there
        file.write_bytes(changed)
        return f"{name}: {difference(raw, changed)}"

    def arguments(self, draw: Random, base: Base, place: Path) -> list[str]:
        """The command line of an edited input."""
        return base.arguments

    def judge(self, base: Base, place: Path, result: Result, changed: list[str]) -> Verdict:
        """What a result is. ``changed``: names of edited files."""
        if (found := failure(result)) is not None:
            return found
        if result.code == 2:
            lost = self.lost(base, place, changed)
            return other(f"lost: {lost}") if lost else refusal(result, (*self.names, *changed))
        outcome = self.outcome(base, place, result)
        return Verdict(SAME) if outcome == base.outcome else self.differs(base, place, result, outcome)

    def lost(self, base: Base, place: Path, changed: list[str]) -> str:
        """What a command that was refused has lost, or nothing."""
        return ""

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        """The verdict on an outcome that is not the base's."""
        return other("another result", f"{outcome!r} instead of {base.outcome!r}"[:2000])


def edit_place(draw: Random, file: Path, files: list[Path]) -> str:
    """One edit of what lies at a path: gone, empty, a folder, a link, two files exchanged."""
    kind = draw.choice(
        ["gone", "folder", "dangling link", "link to itself", "exchanged", "exchanged", "link to another"]
    )
    another = draw.choice(files)
    if kind == "exchanged":
        if another == file or not (file.is_file() and another.is_file()):
            return "left as it is"
        one, two = file.read_bytes(), another.read_bytes()
        file.write_bytes(two)
        another.write_bytes(one)
        return f"exchanged with {another.name}"
    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "link to another" and another != file:
        file.symlink_to(os.path.relpath(another, file.parent))
    return kind


def difference(old: bytes, new: bytes) -> str:
    """Where two contents differ, in a line."""
    first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return (
        f"{len(old)} → {len(new)} bytes, from byte {first}: {old[first : first + 24]!r} → {new[first : first + 24]!r}"
    )


def ask(place: Path, question: Callable[[], Any]) -> Any:
    """What ``question`` returns (fit for JSON), asked in a fork of this process; ``None`` where it raises or crashes."""
    answer = place / ".answer"
    answer.unlink(missing_ok=True)

    def work() -> int:
        answer.write_text(json.dumps(question()))
        return 0

    return json.loads(answer.read_text()) if forked(work, place).code == 0 else None


# What a command said ----------------------------------------------------------------------------------------------------


def failure(result: Result) -> Verdict | None:
    """A traceback, a crash or a hang; ``None`` for a command that ended with 0 or 2 as it should."""
    where = re.findall(r'File "[^"]*?/(pretrain/[^"]+)", line \d+,? in (\S+)', result.err)
    if result.hung:
        return Verdict(HANG, f"hangs in {':'.join(where[0]) if where else '?'}", result.err[-3000:])
    if result.code < 0:
        return Verdict(
            TRACEBACK, f"signal {-result.code} in {':'.join(where[0]) if where else '?'}", result.err[-3000:]
        )
    if "Traceback (most recent call last)" in result.err or "panicked at" in result.err or result.code not in (0, 2):
        kinds = re.findall(r"^([\w.]*(?:Error|Exception|Interrupt|Warning|Exit|Iteration)\b)", result.err, re.MULTILINE)
        kind = kinds[-1] if kinds else f"exit code {result.code}"
        return Verdict(TRACEBACK, f"{kind} in {':'.join(where[-1]) if where else '?'}", result.err[-3000:])
    return None


def refusal(result: Result, names: tuple[str, ...]) -> Verdict:
    """Exit code 2: one line, the last one, that names what it is about."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or not lines[-1].startswith("error: "):
        return other("a refusal is not one line", result.err[-3000:])
    if len(errors[0]) > LONGEST_LINE:
        return other("a refusal of more than 4,000 characters", errors[0][:3000])
    if names and not any(name in errors[0] for name in names):
        shape = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "…", errors[0])[:60]
        return other(f"a refusal names no file: {shape}", errors[0][:3000])
    return Verdict(REFUSED)
