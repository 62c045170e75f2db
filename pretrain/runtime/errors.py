"""Errors for the user: they are printed as one clear message without a traceback, and the exit code is 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 500  # maximal length of another library's message, which may quote the input


class UserError(ValueError):
    """A mistake in the configuration or the input; the message names the key, the value and what is allowed."""


class NoRoom(UserError):
    """A disk, or a quota, is full."""


class WorkersFailed(RuntimeError):
    """A worker process died or raised. The message holds its error, because the parent has no useful traceback of its own."""


class ReplicasDiffer(RuntimeError):
    """Ranks that must hold the same numbers do not, because of a faulty machine or a bug. The message names the step, the
    ranks and the tensors."""


def one_line(error: BaseException, *, lines: int | None = 1) -> str:
    """Return another library's error as one line that can follow a file's name: the first ``lines`` of its message that are not
    empty (``None``: all of them), or the name of its type if the message is empty."""
    filled = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return " ".join(filled[:lines])[:MOST_CHARACTERS] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or the list of known names when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, cutoff=0.8) or difflib.get_close_matches(name, names, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; allowed: " + ", ".join(names) if names else ""
