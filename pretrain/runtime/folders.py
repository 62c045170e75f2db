"""Checks of folders: which user owns one, which files make it complete, and whether a path leads out of it."""

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

MARKER = "COMPLETE.json"  # the marker of a complete folder: its files with sizes and checksums


def is_below(name: str) -> bool:
    """Return whether the relative path ``name``, read from a file, stays inside that file's folder."""
    return not os.path.isabs(name) and ".." not in PurePath(name).parts


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether the file, after following links, is in ``folder``. In the Hub's cache all files of a snapshot are links to
    the ``blobs`` of the same repository, which are accepted."""
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (root.parent.name == "snapshots" and target.parent == blobs)


def marked_files(folder: Path, pattern: str) -> list[str]:
    """Return the names in the folder's marker that match ``pattern``. Other files in the folder are ignored. The list is empty
    if there is no readable marker."""
    try:
        names = read_json(folder / MARKER)["files"]
        return [name for name in sorted(names) if fnmatch(name, pattern) and is_below(name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


SHARED = "PRETRAIN_SHARED_FOLDERS"  # environment variable: the users who share a folder trust each other


def check_private(folder: Path, key: str) -> None:
    """Check whether another user could change what a run reads and writes in ``folder``, the value of ``key``.

    Raises ``UserError`` if the folder belongs to another user, or if every user of the machine can write to it or to a parent
    without the sticky bit (with the sticky bit they can't change each other's files). A folder writable by a group of several
    users only causes a notice, because an administrator has created the group. Root is exempt from the check of the owner,
    since in a container it owns few of the folders. With ``SHARED`` in the environment every finding is only a notice.
    """
    reason = _shared_by(folder)
    if reason is None:
        return
    if not trusts_shared_folders():
        raise UserError(
            f"{key}={folder}: {reason}; others could change what is read and written there; choose another folder, or set "
            f"{SHARED}=1 if all of them are trusted"
        )
    _say(f"{key}={folder}: {reason}; others could change what is read and written there")


def trusts_shared_folders() -> bool:
    """Return whether the environment declares that all users who can write to a folder are trusted."""
    return os.environ.get(SHARED) not in (None, "", "0")


def _shared_by(folder: Path) -> str | None:
    """Return which other user could change the folder, as a sentence, or ``None``. A group only causes a notice."""
    found = folder.stat()
    for place in _with_parents(folder):
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"every user of this machine can write in {place} (chmod o-w prevents that)"
    if found.st_uid not in (0, os.geteuid()) and os.geteuid() != 0:
        return "it belongs to another user"
    if found.st_mode & stat.S_IWGRP and not found.st_mode & stat.S_ISVTX and not _is_own_group(found.st_gid):
        _say(f"{folder} and what a run reads from it can be changed by everybody in its group; chmod g-w prevents that")
    return None


def exchangeable_at(folder: Path) -> Path | None:
    """Return a parent of ``folder`` in which another user who can get there could put another folder in its place, or ``None``.
    In one with the sticky bit they can't. ``folder`` is a path without links."""
    found = None
    for place in folder.parents:
        stats = place.stat()
        mode, others = stats.st_mode, stat.S_IWOTH if _is_own_group(stats.st_gid) else stat.S_IWOTH | stat.S_IWGRP
        if not mode & (stat.S_IXGRP | stat.S_IXOTH):
            found = None  # nobody else gets below it
        elif mode & others and not mode & stat.S_ISVTX:
            found = place
    return found


def _with_parents(folder: Path) -> list[Path]:
    """Return the folder and all of its parents, and those of its target if it is a link."""
    named, real = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))
    return list(dict.fromkeys(p for path in (real, named) for p in (path, *path.parents) if p.exists()))


def _is_own_group(gid: int) -> bool:
    """Return whether the user is the only member of the group. Most systems create such a group for each user."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:  # the group has no name here, so its members are unknown
        return gid == os.getegid() == os.geteuid()
    alone = set(group.gr_mem) <= {user.pw_name}
    return alone and (gid == user.pw_gid) and group.gr_name == user.pw_name


@cache
def _say(message: str) -> None:
    notice(message)


def check_links(folder: Path, key: str, names: Iterable[str]) -> None:
    """Check the existing entries of ``folder`` that a run writes to. ``names`` lists them; ``logs/*`` means every entry of the
    folder ``logs``.

    Raises ``UserError`` for a link, through which another place would be written, for an entry that is neither a file nor a
    folder, and for one that belongs to another user. ``folder`` itself may be a link.
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
            wrong = "owned by another user"
        else:
            continue
        raise UserError(f"{key}={folder}: {name} in it is {wrong}; remove it, or choose another folder")


def _present(folder: Path, name: str) -> list[Path]:
    """Return the existing entries that a name selects, including dangling links."""
    path = folder / name.removesuffix("/*")
    if name.endswith("/*"):
        return sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    return [path] if os.path.lexists(path) else []
