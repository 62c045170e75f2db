"""The files that a run has read, and which of them have changed since. The record is kept in the run folder, so that a resumed
run can name changed files, and the files are checked during the run."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pretrain.data.reading.opening import stamp_of
from pretrain.data.reading.units import Stamp, WorkUnit, key_of
from pretrain.runtime.console import notice
from pretrain.runtime.files import replace_file
from pretrain.runtime.places import is_url
from pretrain.telemetry.events import Evaluated, Event, RunFinished, Saved

Files = dict[str, tuple[Stamp, str]]  # path → its stamp and the digest of what was read of it
MOST_NAMED = 5
LAST_CHECK_SECONDS = 1.0  # how long the end of a run waits for a check in progress


def files_of(units: Iterable[WorkUnit], digests: Iterable[Sequence[str]]) -> Files:
    """Return the files of ``units``. ``digests`` holds the digests of each unit's pieces."""
    stamps: dict[str, Stamp] = {}
    found: dict[str, list[str]] = defaultdict(list)
    for unit, unit_digests in zip(units, digests, strict=True):
        for piece, digest in zip(unit.pieces, unit_digests, strict=True):
            stamps[piece.path] = piece.stamp
            found[piece.path].append(digest)
    return {path: (stamps[path], found[path][0] if len(found[path]) == 1 else key_of(found[path])) for path in stamps}


def save_files(path: Path, files: Files) -> None:
    """Write ``files`` to ``path``."""
    replace_file(path, json.dumps(files))


def load_files(path: Path) -> Files:
    """Return what ``save_files`` wrote; an empty dict if the file is missing (runs of earlier versions have none) or damaged."""
    try:
        return {name: (tuple(stamp), digest) for name, (stamp, digest) in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def differing(before: Files, after: Files) -> str:
    """Return the differences as ``"/d/a.txt changed, /d/b.txt is gone, /d/c.txt is new"``. Contents are compared, not dates."""
    if not before:
        return ""
    changed = [path for path in before if path in after and before[path][1] != after[path][1]]
    gone = [path for path in before if path not in after]
    new = [path for path in after if path not in before]
    return _named([(changed, "changed"), (gone, "is gone"), (new, "is new")])


class FilesWatch:
    """A listener that reports once which files were changed or removed during the run. It checks them after each evaluation and
    save, in a thread of its own, because a disk may be slow or not respond at all."""

    def __init__(self, files: Files) -> None:
        # A request for every remote file at each evaluation would cost more than it tells.
        self._stamps = {path: stamp for path, (stamp, _) in files.items() if not is_url(path)}
        self._thread: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunFinished) and self._thread is not None:
            self._thread.join(LAST_CHECK_SECONDS)
        if not isinstance(event, Evaluated | Saved) or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._check, name="files", daemon=True)
        self._thread.start()

    def _check(self) -> None:
        """Compare the stamps of all files and print a notice about those that differ."""
        changed, gone = [], []
        for path, stamp in self._stamps.items():
            try:
                if stamp_of(path) != stamp:
                    changed.append(path)
            except OSError:
                gone.append(path)
        if changed or gone:
            self._stamps = {}  # the notice is printed only once
            notice(
                f"data: {_named([(changed, 'changed'), (gone, 'is gone')])} since this run read it; the run continues with its "
                "cached tokens, but it can't be resumed if the text has changed"
            )


def _named(kinds: list[tuple[list[str], str]]) -> str:
    """Return (paths, what happened to them) as a list in words, with at most ``MOST_NAMED`` paths of each kind."""
    parts = [f"{path} {what}" for paths, what in kinds for path in paths[:MOST_NAMED]]
    more = sum(len(paths[MOST_NAMED:]) for paths, _ in kinds)
    return ", ".join(parts) + (f", and {more:,} more files" if more else "")
