"""Long plain text has no documents of its own: cut it where a reader would pause, never inside a word if that can be
helped."""

from __future__ import annotations

from collections.abc import Iterator

PAUSES = ("\n\n", "\n", ". ", " ")  # paragraph, line, sentence, word: the first that is there decides


def sections(text: str, size: int) -> Iterator[str]:
    """Cut ``text`` into pieces of at most ``size`` characters; joined again they are ``text``.

    A cut is looked for in the second half of each piece, so that pieces are never shorter than ``size / 2`` but for
    the last.
    """
    start = 0
    while len(text) - start > size:
        stop = _pause(text, start + size // 2, start + size)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _pause(text: str, low: int, high: int) -> int:
    for pause in PAUSES:
        found = text.rfind(pause, low, high)
        if found >= 0:
            return found + len(pause)
    return high
