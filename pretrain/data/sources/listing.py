"""The files of a folder or a glob. Each file is listed once, regardless of how many links lead to it, and files that a run of
this program wrote are left out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from functools import cache

from pretrain.data.cache import cache_dir
from pretrain.data.reading.units import reading
from pretrain.runtime.console import notice

# A folder that holds all names of one of these tuples is skipped: a folder of a run (of any task), of a sweep, a token cache, or
# the folder of a model.
FOLDERS_WITHOUT_TEXT = (
    (".lock", "logs"),
    ("config.yaml", "run.json"),
    ("sweep.json",),
    ("parts", "stores", "tokenizers"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
    ("config.json", "tokenizer.json"),
)


def in_folder(folder: str, pattern: str) -> list[str]:
    """Return the files in ``folder`` and below whose name, or path relative to any folder there, matches ``pattern``. Hidden
    files are left out."""
    pattern = pattern.removeprefix("**/")
    patterns = (os.path.join(glob.escape(path), pattern) for path in _folders(folder, follow=False))
    found = {name for below in patterns for name in matching(below)}
    visible = sorted(name for name in found if not _hidden(os.path.relpath(name, folder)))
    away = [name for name in visible if os.path.islink(name) and not _below(os.path.realpath(name), folder)]
    if away:
        notice_once(
            f"{folder}: {len(away)} of its files are links out of the folder, such as {away[0]} → {os.path.realpath(away[0])}"
        )
    return visible


def matching(pattern: str) -> list[str]:
    """Return the files whose path matches ``pattern``, as ``glob.glob(recursive=True)`` does, except that ``**`` enters each
    folder only once, so that circular links end."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return sorted(_files(pattern))
    at = parts.index("**")
    rest = os.sep.join(parts[at + 1 :]) or "*"
    roots = glob.glob(os.sep.join([*parts[:at], ""]))
    paths = (path for root in sorted(roots) for path in _folders(root, follow=True))
    return sorted({name for path in paths for name in matching(os.path.join(glob.escape(path), rest))})


def without_duplicates(names: Iterable[str]) -> list[str]:
    """Return ``names`` with one name per file: further symbolic or hard links to it are removed. A path that is not a symbolic
    link is preferred."""
    kept: dict[object, str] = {}
    for name in sorted(names, key=lambda name: (os.path.islink(name), name)):
        with reading(name):
            found = os.stat(name)
        same = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if found.st_ino else name
        kept.setdefault(same, name)
    return sorted(kept.values())


def _files(pattern: str) -> list[str]:
    """Return the normalised paths of the files that match ``pattern``, without ``**``."""
    return [os.path.normpath(name) for name in glob.glob(pattern) if os.path.isfile(name)]


def _folders(root: str, *, follow: bool) -> Iterator[str]:
    """Yield ``root`` and the folders below it, each once. Hidden folders and folders of runs, models or caches are skipped, and
    links to folders are followed only with ``follow=True``."""
    seen, left_out, links = {_identity(root)}, [], []

    def is_new(path: str) -> bool:
        if os.path.islink(path) and not follow:
            links.append(path)
        elif _holds_no_text(path):
            left_out.append(path)
        elif (identity := _identity(path)) not in seen:
            seen.add(identity)
            return True
        return False

    def unreadable(error: OSError) -> None:
        notice_once(f"{error.filename}: not read ({error.strerror})")

    for path, names, _ in os.walk(root, followlinks=follow, onerror=unreadable):
        names[:] = [name for name in sorted(names) if not name.startswith(".") and is_new(os.path.join(path, name))]
        yield path
    for found, what in (
        (left_out, "folders of runs, models or caches"),
        (links, "links to folders, which a glob such as 'd/**/*' follows"),
    ):
        if found:
            notice_once(f"{root}: skipped {len(found)} {what}, such as {found[0]}")


def _holds_no_text(path: str) -> bool:
    """Return whether a folder is the token cache or belongs to a run, a sweep or a model."""
    if os.path.realpath(path) == os.path.realpath(cache_dir()):
        return True
    return any(all(os.path.lexists(os.path.join(path, name)) for name in marks) for marks in FOLDERS_WITHOUT_TEXT)


def _identity(path: str) -> tuple[int, int]:
    """Return device and inode of a path."""
    with reading(path):
        found = os.stat(path)
    return found.st_dev, found.st_ino


def _below(path: str, folder: str) -> bool:
    """Return whether ``path`` is inside ``folder``."""
    return os.path.commonpath([path, os.path.realpath(folder)]) == os.path.realpath(folder)


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split(os.sep))


@cache
def notice_once(message: str) -> None:
    """Print ``message`` as a notice, unless it was printed before."""
    notice(message)
