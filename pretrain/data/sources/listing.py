"""Which files a folder or a glob holds: each file once, however many names lead to it, and nothing that a run of ours wrote
there."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from functools import cache

from pretrain.data.cache import cache_dir
from pretrain.data.reading.units import reading
from pretrain.runtime.console import notice

NO_TEXT = (  # what lies in a folder of a run (of any task), of a sweep, in a token cache, in a folder of a model
    (".lock", "logs"),
    ("config.yaml", "run.json"),
    ("sweep.json",),
    ("parts", "stores", "tokenizers"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
    ("config.json", "tokenizer.json"),
)


def in_folder(folder: str, pattern: str) -> list[str]:
    """Files in ``folder`` and below whose name, or path from some folder there, matches ``pattern``; hidden ones left out."""
    pattern = pattern.removeprefix("**/")
    patterns = (os.path.join(glob.escape(path), pattern) for path in _folders(folder, follow=False))
    found = {name for below in patterns for name in matching(below)}
    visible = sorted(name for name in found if not _hidden(os.path.relpath(name, folder)))
    away = [name for name in visible if os.path.islink(name) and not _below(os.path.realpath(name), folder)]
    if away:
        say_once(
            f"{folder}: {len(away)} of its files are links out of the folder, such as {away[0]} → {os.path.realpath(away[0])}"
        )
    return visible


def matching(pattern: str) -> list[str]:
    """Files whose path matches, as ``glob.glob(recursive=True)`` finds them, but ``**`` enters each folder once: links that
    lead in circles would never end."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return sorted(_files(pattern))
    at = parts.index("**")
    rest = os.sep.join(parts[at + 1 :]) or "*"
    roots = glob.glob(os.sep.join([*parts[:at], ""]))
    paths = (path for root in sorted(roots) for path in _folders(root, follow=True))
    return sorted({name for path in paths for name in matching(os.path.join(glob.escape(path), rest))})


def without_doubles(names: Iterable[str]) -> list[str]:
    """``names`` without further names of the same file, by symbolic or hard link. What is no symbolic link stays."""
    kept: dict[object, str] = {}
    for name in sorted(names, key=lambda name: (os.path.islink(name), name)):
        with reading(name):
            found = os.stat(name)
        same = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if found.st_ino else name
        kept.setdefault(same, name)
    return sorted(kept.values())


def _files(pattern: str) -> list[str]:
    return [os.path.normpath(name) for name in glob.glob(pattern) if os.path.isfile(name)]


def _folders(root: str, *, follow: bool) -> Iterator[str]:
    """``root`` and the folders below it that are neither hidden nor of runs, models or caches, each once; links to
    folders only where asked."""
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
        say_once(f"{error.filename}: not read ({error.strerror})")

    for path, names, _ in os.walk(root, followlinks=follow, onerror=unreadable):
        names[:] = [name for name in sorted(names) if not name.startswith(".") and is_new(os.path.join(path, name))]
        yield path
    for found, what in (
        (left_out, "folders of runs, models or caches"),
        (links, "links to folders, which a glob such as 'd/**/*' follows"),
    ):
        if found:
            say_once(f"{root}: not read in it: {len(found)} {what}, such as {found[0]}")


def _holds_no_text(path: str) -> bool:
    if os.path.realpath(path) == os.path.realpath(cache_dir()):
        return True
    return any(all(os.path.lexists(os.path.join(path, name)) for name in marks) for marks in NO_TEXT)


def _identity(path: str) -> tuple[int, int]:
    with reading(path):
        found = os.stat(path)
    return found.st_dev, found.st_ino


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, os.path.realpath(folder)]) == os.path.realpath(folder)


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split(os.sep))


@cache
def say_once(message: str) -> None:
    notice(message)
