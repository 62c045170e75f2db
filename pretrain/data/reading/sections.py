"""Cutting long plain text, which has no document boundaries, into sections at paragraph, line, sentence or word ends."""

from __future__ import annotations

from collections.abc import Iterator

PAUSES = ("\n\n", "\n", ". ", " ")  # paragraph, line, sentence, word: the first one that occurs is used


def sections(text: str, size: int) -> Iterator[str]:
    """Cut ``text`` into sections of at most ``size`` characters, whose concatenation is ``text``.

    Each cut is placed in the second half of a section, so only the last section can be shorter than ``size / 2``.
    """
    start = 0
    while len(text) - start > size:
        stop = _pause(text, start + size // 2, start + size)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _pause(text: str, low: int, high: int) -> int:
    """Return the position after the last pause in ``text[low:high]``; ``high`` if there is none."""
    for pause in PAUSES:
        found = text.rfind(pause, low, high)
        if found >= 0:
            return found + len(pause)
    return high
