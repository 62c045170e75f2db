"""Regular expressions of a config that choose among the names of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pretrain.runtime.errors import UserError

SHOWN = 24  # names in a message


def matching(pattern: str, names: Iterable[str], *, key: str) -> set[str]:
    """Return the ``names`` in which ``pattern`` is found. Raises ``UserError`` that starts with ``key`` for a pattern that is no
    regular expression, and for one that is found in no name; the message then lists the names."""
    names = list(names)
    expression = compiled(pattern, key=key)
    found = {name for name in names if expression.search(name)}
    if not found:
        raise UserError(f"{key}={pattern!r} matches nothing; there is {summary(names)}")
    return found


def compiled(pattern: str, *, key: str) -> re.Pattern[str]:
    """Return the compiled ``pattern``. Raises ``UserError`` that starts with ``key`` where it is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}={pattern!r}: not a regular expression: {error}") from None


def summary(names: Iterable[str]) -> str:
    """Return the names as text, in which ``*`` stands for the number of a block; at most ``SHOWN`` of them."""
    short = [*dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)]
    more = f" and {len(short) - SHOWN} more" if len(short) > SHOWN else ""
    return ", ".join(short[:SHOWN]) + more
