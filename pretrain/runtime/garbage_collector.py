"""Settings of Python's garbage collector. While a program starts, imports create millions of objects that all stay, and
scanning them repeatedly took a sixth of the CPU time to the first step (measured on one process)."""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()


def collect_rarely() -> None:
    """Collect only after half a million new objects from now on. Disabling it would let memory grow in a long preparation."""
    gc.set_threshold(500_000, *USUAL[1:])


def restore_thresholds() -> None:
    """Restore the usual thresholds at the end of the start, and exclude all present objects from later collections."""
    gc.freeze()
    gc.set_threshold(*USUAL)
