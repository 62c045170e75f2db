"""Places of data as a config names them: a path, a URL or a Hub id, or a list of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

# `simplecache::s3://…` chains file systems; a path with `::` alone does not.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:://|::.*://)", re.DOTALL)
MOST_NAMED = 2


def is_url(place: str) -> bool:
    """Return whether ``place`` is a URL and not a path."""
    return URL.match(place) is not None


def each(places: Any) -> list[str]:
    """Return the places of a value that may be a single place, a list or missing."""
    if places is None:
        return []
    several = isinstance(places, Sequence) and not isinstance(places, str)
    return [str(place) for place in (places if several else [places])]


def absolute(place: str) -> str:
    """Return the absolute path of ``place``; a URL as it is."""
    return place if is_url(place) else os.path.abspath(os.path.expanduser(place))


def joined(names: Sequence[str]) -> str:
    """Return one name for several: the first two and the number of the others, as in ``es+fr+3``."""
    different = list(dict.fromkeys(names))
    more = len(different) - MOST_NAMED
    return "+".join(different[:MOST_NAMED]) + (f"+{more}" if more > 0 else "")
