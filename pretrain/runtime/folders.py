"""Whose a folder is, what makes it whole, and whether a name that a file gives leads out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePath

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.strict_json import read_json

MARKER = "COMPLETE.json"  # of a folder that is whole: its files, with sizes and checksums


def is_below(name: str) -> bool:
    """Whether ``name``, read in a file, stays in that file's folder."""
    return not os.path.isabs(name) and ".." not in PurePath(name).parts


def is_inside(path: Path, folder: Path) -> bool:
    """Whether the file itself, links followed, lies in ``folder``. In the Hub's cache all files of a snapshot are links into
    the ``blobs`` of the same repository."""
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (root.parent.name == "snapshots" and target.parent == blobs)


def marked_files(folder: Path, pattern: str) -> list[str]:
    """Names of the files that match ``pattern`` among those that make a folder whole; what else lies there is not its
    own. None without a marker that can be read."""
    try:
        names = read_json(folder / MARKER)["files"]
        return [name for name in sorted(names) if fnmatch(name, pattern) and is_below(name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


SHARED = "PRETRAIN_SHARED_FOLDERS"  # in the environment: people who share a folder trust each other
NEW_FOLDER = 0o775  # whatever the umask: others may not write


def make_folder(path: Path) -> None:
    """Make a folder, and what is missing above it; none of them can be changed by others."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(NEW_FOLDER, exist_ok=True)


def check_private(folder: Path, key: str) -> None:
    """Look whether somebody else could change what a run reads and writes in ``folder``, which ``key`` has named.

    Raises ``UserError`` for a folder of another user, and where every user of the machine can write, in it or in one above,
    without the sticky bit, which keeps them from others' files. A group of several people costs a notice: an administrator
    has made it. Root, in a container, owns few of its folders. With ``SHARED`` in the environment all of it is a notice.
    """
    reason = _shared_by(folder)
    if reason is None:
        return
    if os.environ.get(SHARED) in (None, "", "0"):
        raise UserError(
            f"{key}={folder}: {reason}, and so could change what is read and written there; choose another place, or set "
            f"{SHARED}=1 where all of them are trusted"
        )
    _say(f"{key}={folder}: {reason}, and so could change what is read and written there")


def _shared_by(folder: Path) -> str | None:
    """Who else could change the folder, as a sentence; only said of a group."""
    found = folder.stat()
    for place in _with_parents(folder):
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"every user of this machine can write in {place} (chmod o-w would end that)"
    if found.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
        return "it belongs to another user"
    if found.st_mode & stat.S_IWGRP and not found.st_mode & stat.S_ISVTX and not _is_own_group(found.st_gid):
        _say(f"{folder} can be changed by everybody in its group, and with it what a run reads back: chmod g-w")
    return None


def _with_parents(folder: Path) -> list[Path]:
    """The folder and all above it, also of what a link leads to."""
    named, real = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))
    return list(dict.fromkeys(p for path in (real, named) for p in (path, *path.parents) if p.exists()))


def _is_own_group(gid: int) -> bool:
    """Whether nobody else is in the group: most systems make one for each user, under the user's name."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:  # of no name here: who is in it can't be known
        return gid == os.getegid() == os.geteuid()
    alone = set(group.gr_mem) <= {user.pw_name}
    return alone and (gid == user.pw_gid) and group.gr_name == user.pw_name


@cache
def _say(message: str) -> None:
    notice(message)


def check_links(folder: Path, key: str, names: Iterable[str]) -> None:
    """Look at what lies in ``folder`` under ``names`` of what is written there; ``logs/*``: all in the folder ``logs``.

    Raises ``UserError`` for a link, through which another place would be written; for what is neither a file nor a folder; and
    for what belongs to another user. ``folder`` itself may be a link.
    """
    for path in (path for name in names for path in _present(folder, name)):
        found, name = path.lstat(), path.relative_to(folder)
        if stat.S_ISLNK(found.st_mode):
            wrong = (
                f"a link to {os.path.realpath(path)}; nothing is written through a link, only {key} itself may be one"
            )
        elif not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            wrong = "neither a file nor a folder"
        elif found.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
            wrong = "of another user"
        else:
            continue
        raise UserError(f"{key}={folder}: {name} in it is {wrong}; remove it, or choose another place")


def _present(folder: Path, name: str) -> list[Path]:
    """What is there under a name, a link that leads nowhere too."""
    path = folder / name.removesuffix("/*")
    if name.endswith("/*"):
        return sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    return [path] if os.path.lexists(path) else []
