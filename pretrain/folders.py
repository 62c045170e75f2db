"""Whose a folder is, what makes it whole, and whether a name that a file gives leads out of it."""

from __future__ import annotations

import os
import stat
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePath

from pretrain.console import notice
from pretrain.strict_json import read_json

MARKER = "COMPLETE.json"  # of a folder that is whole: its files, with sizes and checksums


def is_below(name: str) -> bool:
    """Whether ``name``, read in a file, stays in that file's folder."""
    return not os.path.isabs(name) and ".." not in PurePath(name).parts


def marked_files(folder: Path, pattern: str) -> list[str]:
    """Names of the files that match ``pattern`` among those that make a folder whole; what else lies there is not its
    own. None without a marker that can be read."""
    try:
        names = read_json(folder / MARKER)["files"]
        return [name for name in sorted(names) if fnmatch(name, pattern) and is_below(name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@cache
def say_if_shared(folder: Path) -> None:
    """One notice where somebody else may change what a run reads back. A notice, not a refusal: nothing in our folders
    is ever executed, and on a shared scratch disk this can be meant. Root in a container owns few of its folders."""
    found = folder.stat()
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        notice(f"{folder} can be changed by every user of this machine, and with it what a run reads back: chmod o-w")
    elif found.st_uid != os.geteuid() != 0:
        notice(f"{folder} belongs to another user, who can change what a run reads back")
