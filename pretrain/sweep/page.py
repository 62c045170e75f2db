"""sweep.html: the jobs of a sweep on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def page(folder: Path, table: dict[str, Any]) -> str:
    return "<!doctype html>"
