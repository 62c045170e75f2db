"""How a process of ours starts another one of this program."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # the folder of this package


def module_command(module: str) -> list[str]:
    """The words that run ``module`` as a program, with imports from where this process has them: ``python -m`` alone puts the
    current folder first, and a stranger's folder may hold a ``yaml.py``."""
    here = {"", os.curdir, os.getcwd()}
    return [sys.executable, *([] if here & set(sys.path) else ["-P"]), "-m", module]
