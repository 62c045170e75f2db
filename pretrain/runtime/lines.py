"""Read files of lines whose writer may have been killed in the middle of the last line, or is writing it now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def ignore(number: int) -> None:
    """Do not report a line."""


def json_lines(
    lines: Iterable[bytes],
    *,
    on_invalid: Callable[[int], None] = ignore,
    on_incomplete: Callable[[int], None] = ignore,
) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line, from 1, and its JSON value. Empty lines are skipped.

    An incomplete last line, which is no JSON and has no line end, is skipped, and so is any other line that is not JSON or ends
    in the middle of a character. ``on_incomplete`` and ``on_invalid`` are called with their numbers.
    """
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if line.strip():
                (on_invalid if line.endswith(b"\n") else on_incomplete)(number)
        else:
            yield number, value


def complete_lines(text: str, end: str) -> list[str]:
    """Return the lines of ``text`` without their ``end`` and without an incomplete last line."""
    return text.split(end)[:-1]
