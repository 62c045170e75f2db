"""Starting another process of this program."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # the folder of this package


def module_command(module: str) -> list[str]:
    """Return the command that runs ``module`` as a program with this process's import path. ``python -m`` alone would put the
    current folder first, and another user's folder may contain a ``yaml.py``."""
    here = {"", os.curdir, os.getcwd()}
    return [sys.executable, *([] if here & set(sys.path) else ["-P"]), "-m", module]
