"""Python's garbage collector, out of the way: while a program starts, imports make millions of objects that all stay, and
looking through them again and again took a sixth of the CPU time to the first step (measured on one process)."""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()


def rarely() -> None:
    """From now on it looks once in half a million new objects; never would let a long preparation grow."""
    gc.set_threshold(500_000, *USUAL[1:])


def as_usual() -> None:
    """The start is over: what exists by now stays and is not looked at again."""
    gc.freeze()
    gc.set_threshold(*USUAL)
