"""Errors meant for the person at the keyboard: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 500  # of another library's message, which may quote the input


class UserError(ValueError):
    """A mistake in the configuration or the input; the message names the key, the value and what is allowed."""


class NoRoom(UserError):
    """A disk, or a quota, is full."""


class WorkersFailed(RuntimeError):
    """A worker process died or raised; the message holds what it said. The parent has no traceback of its own to show."""


class ReplicasDiffer(RuntimeError):
    """Ranks that must hold the same numbers do not: a fault of a machine, or a bug. The message names step, ranks and what."""


def one_line(error: BaseException, *, lines: int | None = 1) -> str:
    """What another library's error says in the first ``lines`` that are not empty (``None``: in all of them), as one line that
    can stand behind a file's name; the name of its type where it says nothing."""
    said = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines])[:MOST_CHARACTERS] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or the list of known names when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; allowed: " + ", ".join(names) if names else ""
