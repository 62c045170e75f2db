"""Format numbers for people, on a terminal and on a page."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TypeGuard

NOTHING = "—"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a finite int or float and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object, digits: int = 2) -> str:
    """Format with thousands separators and ``digits`` decimals."""
    return f"{value:,.{digits}f}".replace("-", "−") if is_number(value) else NOTHING


def significant(value: object) -> str:
    """Format a number of any size with five significant digits."""
    return f"{value:,.5g}".replace("-", "−") if is_number(value) else NOTHING


def signed(value: object, digits: int = 4) -> str:
    """Format like `number`, with a sign."""
    return f"{value:+,.{digits}f}".replace("-", "−") if is_number(value) else NOTHING


def compact(value: float) -> str:
    """Format a number for an axis or a legend: 12k, 3.4M, 0.042, 1e-05."""
    size = abs(value)
    if size == 0 or not math.isfinite(value):
        return "0" if size == 0 else "—"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.3g}{letter}".replace("-", "−", 1)
    return ("−" if value < 0 else "") + f"{size:.3g}"


def amount(value: object) -> str:
    """Format a count or a rate in short form: 12.3k."""
    return compact(value) if is_number(value) else NOTHING


def share(value: object, digits: int = 0) -> str:
    """Format a fraction as a percentage; a non-zero value that would round to 0 becomes ``<1 %``."""
    if not is_number(value):
        return NOTHING
    least = 10.0**-digits  # the smallest percentage that is not shown as 0
    return f"{100 * value:.{digits}f} %" if value == 0 or 100 * value >= least / 2 else f"<{least:g} %"


def size(value: object) -> str:
    """Format a number of bytes: 12.3 MB."""
    if not is_number(value):
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: object) -> str:
    """Format seconds: 4 ms, 8.4 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def instant(seconds: object) -> str:
    """Format Unix seconds as a date and a time of day in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if is_number(seconds) else NOTHING
