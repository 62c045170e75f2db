"""The files behind a URL: a file, a folder or a glob, by the rules of folders on this machine."""

from __future__ import annotations

import fnmatch
import posixpath
from collections import defaultdict
from collections.abc import Iterable

from pretrain.data.reading.opening import open_file
from pretrain.data.reading.units import SourceFile, Stamp
from pretrain.data.remote.addresses import MAGIC, check_url, is_web, path_of
from pretrain.data.remote.backend import Backend, backend_of
from pretrain.data.remote.stream import patiently
from pretrain.data.sources.formats import format_of, with_formats
from pretrain.data.sources.listing import FOLDERS_WITHOUT_TEXT, notice_once
from pretrain.data.sources.saved import MARKS, NOT_SAVED, saved_files
from pretrain.runtime.errors import UserError

TOKEN_FILES = (".npy", ".ds", ".bin")  # they are mapped into memory, together with the files beside them
LONGEST_STATE = 64 << 20  # bytes of a state.json


def remote_files(url: str, *, pattern: str | None = None, format: str = "auto") -> list[SourceFile]:  # noqa: A002 (the key)
    """Return the files of ``url`` with their stamps.

    Args:
        url: a file, a folder or a glob.
        pattern: which files of a folder are read as text; ``None``: those of known formats.
        format: as in ``Local``.

    Raises:
        UserError: the URL is not read, nothing is there, or access is denied.
    """
    check_url(url)
    if format == "tokens":
        raise UserError(
            f"dataset.nameOrPath={url}: token ids (dataset.format=tokens) are read on this machine only; copy them"
        )
    backend = backend_of(url)
    if not is_web(url) and MAGIC.search(url):
        return _matching(backend, url)
    if not url.endswith("/") and (stamp := patiently(url, lambda: backend.stamp(url))) is not None:
        return [SourceFile(url, _format(url), stamp)]
    folder = url.rstrip("/")
    files = _below(backend, folder)
    if not files:
        raise UserError(f"dataset.nameOrPath={url}: no such file or folder, or an empty one")
    marks = [mark for mark in MARKS if f"{folder}/{mark}" in files]
    if format == "hf" and not marks:
        raise UserError(f"dataset.nameOrPath={url}: {NOT_SAVED}")
    if marks and format != "files":
        names = saved_files(folder, several="dataset_dict.json" in marks, load=lambda name: _content(name, files))
        return [SourceFile(name, "arrow", _stamp_in(files, name)) for name in names]
    names = [name for name in _readable(folder, files) if pattern is None or _matches_below(name, folder, pattern)]
    known = with_formats(names, url, pattern)
    return [SourceFile(name, known[name], files[name]) for name in known]


def _below(backend: Backend, folder: str, depth: int | None = None) -> dict[str, Stamp]:
    """Return the files below ``folder``, sorted by name. Hidden files and folders are left out."""
    found = patiently(folder, lambda: dict(backend.below(folder, depth)))
    return {name: found[name] for name in sorted(found) if not _is_hidden(posixpath.relpath(name, folder))}


def _readable(folder: str, files: Iterable[str]) -> list[str]:
    """Return the files that are not in the folder of a run, a sweep, a model or a token cache below ``folder``."""
    entries: dict[str, set[str]] = defaultdict(set)
    for name in files:
        path = name
        while path != folder:
            path, _, entry = path.rpartition("/")
            if entry in entries[path]:
                break
            entries[path].add(entry)
    without = {
        path
        for path, names in entries.items()
        if path != folder and any(names >= {*marks} for marks in FOLDERS_WITHOUT_TEXT)
    }
    if without:
        notice_once(f"{folder}: skipped {len(without)} folders of runs, models or caches, such as {min(without)}")
    return [name for name in files if not without.intersection(_parents(name, folder))] if without else [*files]


def _parents(name: str, folder: str) -> Iterable[str]:
    while len(name := name.rpartition("/")[0]) > len(folder):
        yield name


def _matching(backend: Backend, url: str) -> list[SourceFile]:
    """Return the files that match a glob. ``**`` stands for any number of folders."""
    parts = url.split("/")
    fixed = next(index for index, part in enumerate(parts) if MAGIC.search(part))
    if fixed < 3:
        raise UserError(f"dataset.nameOrPath={url}: a glob in the name of the bucket")
    root, pattern = "/".join(parts[:fixed]), parts[fixed:]
    files = _below(backend, root, None if "**" in pattern else len(pattern))
    found = [name for name in files if _matches(name[len(root) + 1 :].split("/"), pattern)]
    if not found:
        raise UserError(f"dataset.nameOrPath={url}: no file matches")
    return [SourceFile(name, _format(name), files[name]) for name in found]


def _format(url: str) -> str:
    """Return the format of a file that was named, or matched by a glob. Raises ``UserError`` for a file of token ids."""
    if path_of(url).endswith(TOKEN_FILES):
        raise UserError(f"{url}: a file of token ids is read on this machine only; copy it, with the files beside it")
    return format_of(path_of(url)) or "text"


def _matches_below(name: str, folder: str, pattern: str) -> bool:
    """Return whether a name, or its path relative to any folder below ``folder``, matches ``pattern``."""
    return _matches(name[len(folder) + 1 :].split("/"), ["**", *pattern.removeprefix("**/").split("/")])


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Return whether the parts of a path match those of a pattern, in time proportional to the product of their numbers."""
    if pattern[-1] == "**":
        pattern = [*pattern, "*"]
    reached = {0}  # numbers of parts that the pattern so far can match
    for part in pattern:
        if part == "**":
            reached = set(range(min(reached), len(parts)))
        else:
            reached = {at + 1 for at in reached if at < len(parts) and fnmatch.fnmatchcase(parts[at], part)}
        if not reached:
            return False
    return len(parts) in reached


def _content(name: str, files: dict[str, Stamp]) -> bytes:
    with open_file(name, _stamp_in(files, name)) as file:
        return file.read(LONGEST_STATE)


def _stamp_in(files: dict[str, Stamp], name: str) -> Stamp:
    if name not in files:
        raise UserError(f"{name}: no such file; save the dataset again")
    return files[name]


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))
